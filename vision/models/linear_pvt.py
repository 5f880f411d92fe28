"""PVT v1 with linear attention and foldable norms: SLAB, InLine and PRepBN, in timm's manner.

Wang et al. 2021 (arXiv:2102.12122); Guo et al. 2024, SLAB (arXiv:2405.11582); Han et al. 2024,
InLine (arXiv:2412.06590).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..attention import SpatialReductionAttention, build_mixer
from .building import build_staged_backbone
from .hierarchical import HierarchicalBackbone
from .options import Choice, attention_choices, default_cfg, norm_choices
from .stages import ConvEmbed, Grid, HierarchicalStage, build_stage


def _mixer(
    kind: str,
    dim: int,
    num_heads: int,
    *,
    grid: Grid,
    sla_kernel_size: int,
    attn_drop: float,
    **kwargs: Any,
) -> nn.Module:
    if kind == "softmax":
        return SpatialReductionAttention(dim, num_heads, attn_drop=attn_drop, **kwargs)
    kwargs["sla_kernel_size"] = sla_kernel_size
    return build_mixer(kind, dim, num_heads, grid=grid, fused_qkv=False, **kwargs)


class LinearPyramidTransformer(HierarchicalBackbone):
    """PVT v1 without class token: four stages, each with patch embedding and position table.

    Softmax blocks reduce keys and values by `sr_ratios`, linear blocks by `linear_sr_ratios`. There
    is no final norm. A stage's patch embedding has the norm of its first block.

    Args:
        img_size: the usual image, pixels; any other is taken as well.
        in_chans: channels of the image.
        num_classes: 0 for features.
        global_pool: as timm's ClassifierHead.
        embed_dims: channels of the stages.
        depths: blocks of the stages.
        num_heads: heads of the stages.
        mlp_ratios: hidden channels of the stages' Mlps, in units of channels.
        sr_ratios: reduction of keys and values in softmax blocks.
        linear_sr_ratios: the same in SLA blocks; InLine needs 1.
        sla_kernel_size: side of the depthwise convolution of SLA blocks, odd.
        attn: ``softmax``, ``sla`` or ``inline``; one for all, one a stage or one a block.
        norm: ``ln``, ``prepbn`` or ``repbn``; one for all, one a stage or one a block.
        norm_eps: eps of the LayerNorms in blocks.
        patch_norm_eps: eps of the LayerNorms in patch embeddings and after spatial reduction;
            None is `norm_eps`.
        qkv_bias: projections have a bias.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections and in Mlps.
        attn_drop_rate: dropout of softmax weights.
        drop_path_rate: stochastic depth of the last block.
        weight_init: see timm's SwinTransformer.

    Raises:
        ValueError: an unknown choice, or an image too small for four stages.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        linear_sr_ratios: Sequence[int] = (1, 1, 1, 1),
        sla_kernel_size: int = 5,
        attn: Choice = "softmax",
        norm: Choice = "ln",
        norm_eps: float = 1e-6,
        patch_norm_eps: float | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        kinds = attention_choices(attn, depths)
        norms = norm_choices(norm, depths, norm_eps)
        patch_eps = norm_eps if patch_norm_eps is None else patch_norm_eps
        patch_norms = norm_choices(norm, depths, patch_eps)
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages: list[HierarchicalStage] = []
        grid, previous = to_2tuple(img_size), in_chans
        for index, dim in enumerate(embed_dims):
            side = 2 if index else 4
            embed = ConvEmbed(previous, dim, side, side, 0, patch_norms[index][0], **dd)
            grid, previous = embed.output_grid(grid), dim
            if index == 0:
                stem = embed
            mixers = [
                _mixer(
                    kind,
                    dim,
                    num_heads[index],
                    grid=grid,
                    sr_ratio=(sr_ratios if kind == "softmax" else linear_sr_ratios)[index],
                    sla_kernel_size=sla_kernel_size,
                    norm_layer=layer,
                    attn_drop=attn_drop_rate,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    **dd,
                )
                for kind, layer in zip(kinds[index], patch_norms[index], strict=True)
            ]
            stages.append(
                build_stage(
                    embed if index else nn.Identity(),
                    mixers,
                    norms[index],
                    rates[index],
                    grid=grid,
                    dim=dim,
                    mlp_ratio=mlp_ratios[index],
                    proj_drop=proj_drop_rate,
                    use_pos_embed=True,
                    **dd,
                )
            )
        super().__init__(
            stem,
            stages,
            embed_dims,
            nn.Identity(),
            img_size,
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            weight_init,
            **dd,
        )


_create = partial(build_staged_backbone, LinearPyramidTransformer)


def _cfg(method: str) -> dict[str, Any]:
    return default_cfg(method, 224, classifier="head.fc", pool_size=(7, 7))


default_cfgs = generate_default_cfgs(
    {
        "pvt_tiny_prepbn.slab_in1k": _cfg("slab"),
        "pvt_small_prepbn.slab_in1k": _cfg("slab"),
        "pvt_medium_prepbn.slab_in1k": _cfg("slab"),
        "pvt_tiny_slab.slab_in1k": _cfg("slab"),
        "pvt_small_slab.slab_in1k": _cfg("slab"),
        "pvt_medium_slab.slab_in1k": _cfg("slab"),
        "pvt_tiny_inline.inline_in1k": _cfg("inline"),
        "pvt_small_inline.inline_in1k": _cfg("inline"),
        "pvt_medium_inline.inline_in1k": _cfg("inline"),
        "pvt_large_inline.inline_in1k": _cfg("inline"),
    }
)

_SMALL: dict[str, Any] = {"depths": (3, 4, 6, 3)}
_MEDIUM: dict[str, Any] = {"depths": (3, 4, 18, 3)}
_LARGE: dict[str, Any] = {"depths": (3, 8, 27, 3)}
_PREPBN: dict[str, Any] = {"norm": "prepbn"}
_SLAB: dict[str, Any] = {"attn": "sla", "norm": "prepbn"}
_INLINE: dict[str, Any] = {
    "attn": "inline", "num_heads": (2, 4, 10, 16), "patch_norm_eps": 1e-5,
}  # fmt: skip


@register_model
def pvt_tiny_prepbn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PVT-T with PRepBN."""
    return _create("pvt_tiny_prepbn", pretrained, **{**_PREPBN, **kwargs})


@register_model
def pvt_small_prepbn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PVT-S with PRepBN."""
    return _create("pvt_small_prepbn", pretrained, **{**_SMALL, **_PREPBN, **kwargs})


@register_model
def pvt_medium_prepbn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PVT-M with PRepBN."""
    return _create("pvt_medium_prepbn", pretrained, **{**_MEDIUM, **_PREPBN, **kwargs})


@register_model
def pvt_tiny_slab(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLAB-PVT-T: SLA and PRepBN."""
    return _create("pvt_tiny_slab", pretrained, **{**_SLAB, **kwargs})


@register_model
def pvt_small_slab(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLAB-PVT-S."""
    return _create("pvt_small_slab", pretrained, **{**_SMALL, **_SLAB, **kwargs})


@register_model
def pvt_medium_slab(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLAB-PVT-M."""
    return _create("pvt_medium_slab", pretrained, **{**_MEDIUM, **_SLAB, **kwargs})


@register_model
def pvt_tiny_inline(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-PVT-T."""
    return _create("pvt_tiny_inline", pretrained, **{**_INLINE, **kwargs})


@register_model
def pvt_small_inline(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-PVT-S."""
    return _create("pvt_small_inline", pretrained, **{**_SMALL, **_INLINE, **kwargs})


@register_model
def pvt_medium_inline(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-PVT-M."""
    return _create("pvt_medium_inline", pretrained, **{**_MEDIUM, **_INLINE, **kwargs})


@register_model
def pvt_large_inline(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-PVT-L."""
    return _create("pvt_large_inline", pretrained, **{**_LARGE, **_INLINE, **kwargs})
