"""timm's Swin block with a choice of attention, whose norms fold exactly."""

from typing import Any

import torch
from timm.models._features_fx import register_notrace_module
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor

from ..attention import build_mixer
from ..fold import FOLDABLE_NORMS, Foldable, NormSite


class FoldableWindowAttention(WindowAttention):
    """timm's window attention, which also takes tokens that are projected already."""

    def attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """``qkv`` (windows, N, 3C) to (windows, N, C), as `forward` does after its projection."""
        num_windows, tokens, _ = qkv.shape
        qkv = qkv.reshape(num_windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1) + self._get_rel_pos_bias()
        if mask is not None:
            scores = scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]
            scores = scores.flatten(0, 1)
        out = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


@register_notrace_module
class LinearSwinBlock(Foldable, SwinTransformerBlock):
    """timm's Swin block around window softmax attention or a linear mixer over the map.

    timm pads maps to whole windows with zeros after the norm, so that a padded token's query, key
    and value are the projection's bias. Once the norm has folded into the projection that bias is
    another; `padding_qkv` keeps the old one, and padded maps are projected before they are padded.

    Args:
        dim: channels.
        input_resolution: ``(h, w)`` of the map.
        kind: ``softmax``, ``sla`` or ``inline``.
        linear_window_size: side of a linear block's windows, None for the whole map.
        linear_window_shift: rolls the map of a linear block by half a window, if windows do not
            cover a side of it, without a mask: tokens of opposite edges meet.
        sla_kernel_size: side of the depthwise convolution of an SLA block, odd.
        kwargs: see timm's SwinTransformerBlock.

    Raises:
        ValueError: linear windows that do not divide the map.
    """

    padding_qkv: Tensor | None

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        *,
        kind: str,
        num_heads: int,
        head_dim: int | None = None,
        window_size: int | tuple[int, int] = 7,
        shift_size: int | tuple[int, int] = 0,
        linear_window_size: int | None = None,
        linear_window_shift: bool = False,
        sla_kernel_size: int = 5,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        is_linear = kind != "softmax"
        super().__init__(
            dim,
            input_resolution,
            num_heads=num_heads,
            head_dim=head_dim,
            window_size=window_size,
            shift_size=0 if is_linear else shift_size,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            attn_drop=attn_drop,
            **kwargs,
            **dd,
        )
        self.is_linear = is_linear
        self.linear_window_size = linear_window_size
        self.linear_window_shift = linear_window_shift
        self.register_buffer("padding_qkv", None)
        if is_linear:
            if head_dim is not None and head_dim * num_heads != dim:
                raise ValueError(
                    f"`head_dim` must be {dim // num_heads} for linear attention, got {head_dim}"
                )
            self.attn = build_mixer(
                kind,
                dim,
                num_heads,
                grid=self._linear_window(self.input_resolution),
                sla_kernel_size=sla_kernel_size,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop,
                **dd,
            )
        else:
            self.attn = FoldableWindowAttention(
                dim,
                num_heads,
                head_dim=head_dim,
                window_size=self.window_size,
                qkv_bias=qkv_bias,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                **dd,
            )

    def _init_buffers(self) -> None:
        # timm takes device and dtype from norm1, which may be folded away.
        weight = self.mlp.fc1.weight
        mask = None
        if not self.dynamic_mask and not getattr(self, "is_linear", False):
            mask = self.get_attn_mask(device=weight.device, dtype=weight.dtype)
        self.register_buffer("attn_mask", mask, persistent=False)

    def norm_sites(self) -> list[NormSite]:
        readers = self.attn.input_layers() if self.is_linear else [self.attn.qkv]
        return [
            NormSite(self, "norm1", readers=readers),
            NormSite(self, "norm2", readers=[self.mlp.fc1]),
        ]

    def reparameterize(self) -> None:
        """Folds both norms."""
        if isinstance(self.norm1, FOLDABLE_NORMS) and not self.is_linear:
            qkv = self.attn.qkv
            bias = qkv.weight.new_zeros(qkv.out_features) if qkv.bias is None else qkv.bias
            self.register_buffer("padding_qkv", bias.detach().clone())
        super().reparameterize()

    def set_input_size(
        self,
        feat_size: tuple[int, int],
        window_size: tuple[int, int],
        always_partition: bool | None = None,
    ) -> None:
        """See timm; a linear block only notes the new map and the window that it does not use."""
        if not self.is_linear:
            super().set_input_size(feat_size, window_size, always_partition)
            return
        self.input_resolution = feat_size
        if always_partition is not None:
            self.always_partition = always_partition
        # As a new model of that size would have it: timm compares and saves the windows of blocks.
        self.window_size, self.shift_size = self._calc_window_shift(window_size)
        self.window_area = self.window_size[0] * self.window_size[1]
        self.attn.set_input_size(self._linear_window(feat_size))

    def _linear_window(self, grid: tuple[int, int]) -> tuple[int, int]:
        side = self.linear_window_size
        if side is None:
            return grid[0], grid[1]
        window = min(side, grid[0]), min(side, grid[1])
        if grid[0] % window[0] or grid[1] % window[1]:
            raise ValueError(
                f"`linear_window_size` must divide the map of {grid[0]} x {grid[1]} tokens,"
                f" got {side}"
            )
        return window

    def _attn(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        _, height, width, channels = x.shape
        if self.is_linear:
            window = self._linear_window((height, width))
            if window == (height, width):
                return self.attn(x.flatten(1, 2), window).unflatten(1, (height, width))
            is_shifted = self.linear_window_shift and window[0] < height and window[1] < width
            shift = (window[0] // 2, window[1] // 2)
            if is_shifted:
                x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
            tokens = window_partition(x, window).reshape(-1, window[0] * window[1], channels)
            out = self.attn(tokens, window).reshape(-1, *window, channels)
            out = window_reverse(out, window, height, width)
            return torch.roll(out, shift, (1, 2)) if is_shifted else out
        is_padded = height % self.window_size[0] or width % self.window_size[1]
        if self.padding_qkv is None or not is_padded:
            return super()._attn(x)
        return self._attn_after_projection(x)

    def _attn_after_projection(self, x: Tensor) -> Tensor:
        """`_attn` of timm in another order: project, shift, pad with `padding_qkv`, attend."""
        batch, height, width, _ = x.shape
        window = self.window_size
        qkv = torch.roll(self.attn.qkv(x), [-side for side in self.shift_size], (1, 2))
        below, right = -height % window[0], -width % window[1]
        pad = self.get_buffer("padding_qkv").to(qkv.dtype)
        qkv = torch.cat([qkv, pad.expand(batch, height, right, -1)], dim=2)
        qkv = torch.cat([qkv, pad.expand(batch, below, width + right, -1)], dim=1)
        _, padded_height, padded_width, channels = qkv.shape
        windows = window_partition(qkv, window).reshape(-1, self.window_area, channels)
        mask = self.get_attn_mask(qkv) if self.dynamic_mask else self.attn_mask
        attn: Any = self.attn
        out = attn.attend(windows, mask)
        out = out.reshape(-1, *window, channels // 3)
        out = window_reverse(out, window, padded_height, padded_width)[:, :height, :width]
        return torch.roll(out, self.shift_size, (1, 2))
