"""DeiT with linear attention and foldable norms: SLAB, InLine and PRepBN, on timm's ViT.

Touvron et al. 2021 (arXiv:2012.12877); Guo et al. 2024, SLAB (arXiv:2405.11582); Han et al. 2024,
InLine (arXiv:2412.06590).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..attention import build_mixer
from ..fold import Foldable, NormSite
from .building import build_backbone, record_input_size
from .loading import filter_checkpoint
from .options import Choice, attention_choices, default_cfg, norm_choices, patch_grid
from .patch_embedding import FoldablePatchEmbed
from .readout import FoldableReadout, exempt_from_decay


class FoldableViTBlock(Foldable, Block):
    """timm's pre-norm block, which can fold its norms."""

    is_linear = False

    def norm_sites(self) -> list[NormSite]:
        return [
            NormSite(self, "norm1", readers=[self.attn.qkv]),
            NormSite(self, "norm2", readers=[self.mlp.fc1]),
        ]


class _NoAttention(nn.Module):
    """Stands where the mixer will be: timm's block makes its attention by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


@register_notrace_module
class LinearViTBlock(FoldableViTBlock):
    """timm's pre-norm block around a linear mixer.

    Args:
        dim: channels.
        num_heads: heads.
        kind: ``sla`` or ``inline``.
        grid: ``(h, w)`` of the patches.
        num_prefix_tokens: class tokens.
        sla_kernel_size: side of the depthwise convolution of an SLA block, odd.
        kwargs: see timm's Block.

    Raises:
        ValueError: an option of timm's attention that the mixers do not have.
    """

    is_linear = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kind: str,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        sla_kernel_size: int = 5,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, usual in {"qk_norm": False, "scale_attn_norm": False, "proj_bias": True}.items():
            if (value := kwargs.get(name, usual)) != usual:
                raise ValueError(f"`{name}` must be {usual} with linear attention, got {value}")
        kwargs["attn_layer"] = _NoAttention
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, **kwargs, **dd)
        self.grid: tuple[int, int] | None = None  # None is the mixer's usual grid
        self.attn = build_mixer(
            kind,
            dim,
            num_heads,
            grid=grid,
            num_prefix_tokens=num_prefix_tokens,
            sla_kernel_size=sla_kernel_size,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            **dd,
        )

    def norm_sites(self) -> list[NormSite]:
        return [
            NormSite(self, "norm1", readers=self.attn.input_layers()),
            NormSite(self, "norm2", readers=[self.mlp.fc1]),
        ]

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("`attn_mask` must be None for linear attention, got a mask")
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), self.grid)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _as_stage(value: str | Sequence[str]) -> Choice:
    """A choice for all blocks, or one a block, as that of the only stage."""
    return value if isinstance(value, str) else [value]


class LinearVisionTransformer(FoldableReadout, VisionTransformer):
    """timm's VisionTransformer with linear attention and foldable norms, chosen block by block.

    Args:
        attn: ``softmax``, ``sla`` or ``inline``; one for all blocks or one a block.
        norm: ``ln``, ``prepbn`` or ``repbn``; one for all blocks or one a block. The final norm is
            that of the last block.
        norm_eps: eps of the LayerNorms.
        sla_kernel_size: side of the depthwise convolution of SLA blocks, odd.
        kwargs: see timm's VisionTransformer.

    Raises:
        ValueError: an unknown choice, an image smaller than a patch, or an option of timm's that
            linear attention does not have.
    """

    patch_embed: Any
    blocks: Any
    head_drop: nn.Module
    pool: Callable[[Tensor], Tensor]
    global_pool: str

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        attn: str | Sequence[str] = "softmax",
        norm: str | Sequence[str] = "ln",
        norm_eps: float = 1e-6,
        sla_kernel_size: int = 5,
        depth: int = 12,
        class_token: bool = True,
        reg_tokens: int = 0,
        patch_drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        kinds = attention_choices(_as_stage(attn), [depth])[0]
        if patch_drop_rate and set(kinds) != {"softmax"}:
            raise ValueError(
                "`patch_drop_rate` must be 0 with linear attention, which needs the whole grid, got"
                f" {patch_drop_rate}"
            )
        norms = norm_choices(_as_stage(norm), [depth], norm_eps)[0]
        grid = patch_grid(img_size, patch_size)

        def block(*, depth: int, norm_layer: Any, **kwargs: Any) -> nn.Module:
            kwargs["norm_layer"] = norms[depth]
            if kinds[depth] == "softmax":
                return FoldableViTBlock(depth=depth, **kwargs)
            return LinearViTBlock(
                depth=depth,
                kind=kinds[depth],
                grid=grid,
                num_prefix_tokens=int(class_token) + reg_tokens,
                sla_kernel_size=sla_kernel_size,
                **kwargs,
            )

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            depth=depth,
            class_token=class_token,
            reg_tokens=reg_tokens,
            patch_drop_rate=patch_drop_rate,
            norm_layer=norms[-1],
            block_fn=block,
            embed_layer=FoldablePatchEmbed,
            **kwargs,
        )

    @property
    def table_grid(self) -> tuple[int, int]:
        """Grid of `pos_embed`."""
        return self.patch_embed.grid_size

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: tokens, position tables and RepBN skips."""
        return exempt_from_decay(self)

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """See timm; the tables of the linear blocks are resized as well."""
        patch_grid(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for block in self.blocks:
            if block.is_linear:
                block.attn.set_input_size(self.patch_embed.grid_size)
        record_input_size(self, self.patch_embed.img_size, patch_size=self.patch_embed.patch_size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.dynamic_img_size:
            # timm's blocks get tokens only; this is where their grid is known.
            for block in self.blocks:
                if block.is_linear:
                    block.grid = (x.shape[1], x.shape[2])
        return super()._pos_embed(x)

    def _pool_type(self) -> str:
        return self.global_pool

    def _pool(self, x: Tensor) -> Tensor:
        return self.pool(x)

    def _drop(self, x: Tensor) -> Tensor:
        return self.head_drop(x)

    def _classify(self, x: Tensor) -> Tensor:
        return self.head(x)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    out_indices = kwargs.pop("out_indices", 3)
    return build_backbone(
        LinearVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=filter_checkpoint,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(method: str, size: int = 224) -> dict[str, Any]:
    return default_cfg(method, size, classifier="head", fixed_input_size=True)


default_cfgs = generate_default_cfgs(
    {
        "deit_tiny_prepbn_patch16_224.slab_in1k": _cfg("slab"),
        "deit_small_prepbn_patch16_224.slab_in1k": _cfg("slab"),
        "deit_tiny_slab_patch16_224.slab_in1k": _cfg("slab"),
        "deit_small_slab_patch16_224.slab_in1k": _cfg("slab"),
        "deit_tiny_inline_patch16_224.inline_in1k": _cfg("inline"),
        "deit_small_inline_patch16_288.inline_in1k": _cfg("inline", 288),
        "deit_base_inline_patch16_448.inline_in1k": _cfg("inline", 448),
    }
)

_TINY = {"embed_dim": 192, "num_heads": 3}
_SMALL = {"embed_dim": 384, "num_heads": 6}
# The authors' SLAB-DeiT averages tokens after the norm instead of reading a class token.
_SLAB = {
    "attn": "sla", "norm": "prepbn",
    "class_token": False, "global_pool": "avg", "fc_norm": False,
}  # fmt: skip


@register_model
def deit_tiny_prepbn_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-T with RepBN alone, as its authors trained it; ``norm="prepbn"`` for the schedule."""
    args = {**_TINY, "norm": "repbn", **kwargs}
    return _create("deit_tiny_prepbn_patch16_224", pretrained, **args)


@register_model
def deit_small_prepbn_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-S with PRepBN."""
    args = {**_SMALL, "norm": "prepbn", **kwargs}
    return _create("deit_small_prepbn_patch16_224", pretrained, **args)


@register_model
def deit_tiny_slab_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLAB-DeiT-T: SLA and PRepBN."""
    return _create("deit_tiny_slab_patch16_224", pretrained, **{**_TINY, **_SLAB, **kwargs})


@register_model
def deit_small_slab_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLAB-DeiT-S: SLA and PRepBN."""
    return _create("deit_small_slab_patch16_224", pretrained, **{**_SMALL, **_SLAB, **kwargs})


@register_model
def deit_tiny_inline_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-DeiT-T."""
    args = {"embed_dim": 192, "num_heads": 6, "attn": "inline", **kwargs}
    return _create("deit_tiny_inline_patch16_224", pretrained, **args)


@register_model
def deit_small_inline_patch16_288(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-DeiT-S, on 288 pixels."""
    args = {"embed_dim": 320, "num_heads": 10, "attn": "inline", **kwargs}
    return _create("deit_small_inline_patch16_288", pretrained, **args)


@register_model
def deit_base_inline_patch16_448(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-DeiT-B, on 448 pixels."""
    args = {"embed_dim": 384, "num_heads": 12, "attn": "inline", **kwargs}
    return _create("deit_base_inline_patch16_448", pretrained, **args)
