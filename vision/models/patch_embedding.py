"""Patch embedding as one matrix product."""

from typing import Any

from timm.layers import PatchEmbed
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..fold import Foldable, NormSite


@register_notrace_module
class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel size, computed as a Linear on patches.

    On an H100 with bfloat16, cuDNN's convolution of 3 channels takes four times as long, and its
    result has the channels first: without a class token, whose concatenation copies, every later
    layer of a model then runs on strided tokens, several times slower.

    Shape:
        ``(B, C, H, W)`` to ``(B, C', H // kernel, W // kernel)``, a view of tokens
        ``(B, h, w, C')``. Pixels beyond the last whole patch are ignored, as by a convolution.
    """

    @classmethod
    def of(cls, conv: nn.Module) -> "PatchConv2d":
        """`conv` itself, or one with its parameters."""
        if isinstance(conv, cls):
            return conv
        assert isinstance(conv, nn.Conv2d)
        assert conv.stride == conv.kernel_size
        options: dict[str, Any] = {
            "kernel_size": conv.kernel_size,
            "stride": conv.stride,
            "bias": conv.bias is not None,
            "device": "meta",
        }
        new = cls(conv.in_channels, conv.out_channels, **options)
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        (high, wide), (height, width) = self.kernel_size, x.shape[-2:]
        rows, columns = height // high, width // wide
        x = x[..., : rows * high, : columns * wide]
        x = x.unflatten(3, (columns, wide)).unflatten(2, (rows, high))  # (B, C, h, kh, w, kw)
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, h, w, C * kh * kw)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class FoldablePatchEmbed(Foldable, PatchEmbed):
    """timm's patch embedding by `PatchConv2d`, whose norm folds back into its convolution."""

    proj: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.proj = PatchConv2d.of(self.proj)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """See timm; another patch size gives another convolution."""
        super().set_input_size(*args, **kwargs)
        self.proj = PatchConv2d.of(self.proj)

    def norm_sites(self) -> list[NormSite]:
        return [NormSite(self, "norm", writer=self.proj)]
