"""CSwin with linear attention and foldable norms: SLAB and InLine, in timm's manner.

Dong et al. 2022 (arXiv:2107.00652); Guo et al. 2024, SLAB (arXiv:2405.11582); Han et al. 2024,
InLine (arXiv:2412.06590).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..attention import CrossShapedWindowAttention, build_mixer
from .building import build_staged_backbone
from .hierarchical import HierarchicalBackbone
from .options import Choice, attention_choices, default_cfg, norm_choices
from .stages import ConvEmbed, Grid, build_stage


def _mixer(
    kind: str,
    dim: int,
    num_heads: int,
    *,
    grid: Grid,
    split_size: int,
    num_branches: int,
    sla_kernel_size: int,
    attn_drop: float,
    **kwargs: Any,
) -> nn.Module:
    if kind == "softmax":
        return CrossShapedWindowAttention(
            dim, num_heads, split_size, num_branches, attn_drop=attn_drop, **kwargs
        )
    # InLine-CSwin makes its local kernels from the block's un-normed input.
    extra: dict[str, Any] = {"raw_context": True} if kind == "inline" else {}
    extra["sla_kernel_size"] = sla_kernel_size
    return build_mixer(kind, dim, num_heads, grid=grid, lepe=True, **extra, **kwargs)


class LinearCSwinTransformer(HierarchicalBackbone):
    """CSwin: an overlapping stem and four stages with overlapping downsampling between.

    Softmax blocks attend in stripes, those of the last stage over the whole map; linear blocks
    over the whole map with LePE. Downsampling has the norm of its stage's first block, the stem
    that of the first and the final norm that of the last block of all.

    Args:
        img_size: the usual image, pixels; any other is taken as well.
        in_chans: channels of the image.
        num_classes: 0 for features.
        global_pool: as timm's ClassifierHead.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths: blocks of the stages.
        num_heads: heads of the stages.
        split_sizes: width of the stripes of softmax blocks, tokens.
        sla_kernel_size: side of the depthwise convolution of SLA blocks, odd.
        mlp_ratio: hidden channels of the Mlps, in units of channels.
        attn: ``softmax``, ``sla`` or ``inline``; one for all, one a stage or one a block.
        norm: ``ln``, ``prepbn`` or ``repbn``; one for all, one a stage or one a block.
        norm_eps: eps of the LayerNorms.
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
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_sizes: Sequence[int] = (1, 2, 7, 7),
        sla_kernel_size: int = 5,
        mlp_ratio: float = 4.0,
        attn: Choice = "softmax",
        norm: Choice = "ln",
        norm_eps: float = 1e-5,
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
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        dims = [embed_dim * 2**index for index in range(len(depths))]
        stem = ConvEmbed(in_chans, dims[0], 7, 4, 2, norms[0][0], **dd)
        grid = stem.output_grid(to_2tuple(img_size))
        stages = []
        for index, dim in enumerate(dims):
            downsample: nn.Module = nn.Identity()
            if index:
                downsample = ConvEmbed(dims[index - 1], dim, 3, 2, 1, norms[index][0], **dd)
                grid = downsample.output_grid(grid)
            mixers = [
                _mixer(
                    kind,
                    dim,
                    num_heads[index],
                    grid=grid,
                    split_size=split_sizes[index],
                    num_branches=1 if index == len(dims) - 1 else 2,
                    sla_kernel_size=sla_kernel_size,
                    attn_drop=attn_drop_rate,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    **dd,
                )
                for kind in kinds[index]
            ]
            stages.append(
                build_stage(
                    downsample,
                    mixers,
                    norms[index],
                    rates[index],
                    grid=grid,
                    dim=dim,
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    use_pos_embed=False,
                    **dd,
                )
            )
        super().__init__(
            stem,
            stages,
            dims,
            norms[-1][-1](dims[-1], **dd),
            img_size,
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            weight_init,
            **dd,
        )


_create = partial(build_staged_backbone, LinearCSwinTransformer)


def _cfg(method: str, size: int = 224) -> dict[str, Any]:
    pool = (size // 32, size // 32)
    return default_cfg(method, size, classifier="head.fc", pool_size=pool)


default_cfgs = generate_default_cfgs(
    {
        "cswin_tiny_slab_224.slab_in1k": _cfg("slab"),
        "cswin_small_slab_224.slab_in1k": _cfg("slab"),
        "cswin_tiny_inline_224.inline_in1k": _cfg("inline"),
        "cswin_small_inline_224.inline_in1k": _cfg("inline"),
        "cswin_base_inline_224.inline_in1k": _cfg("inline"),
        "cswin_base_inline_384.inline_in1k": _cfg("inline", 384),
    }
)

_SLAB: dict[str, Any] = {"attn": ("sla", "sla", "softmax", "softmax"), "norm": "prepbn"}
_INLINE: dict[str, Any] = {"attn": ("inline", "inline", "softmax", "softmax")}
_BASE: dict[str, Any] = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}


@register_model
def cswin_tiny_slab_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLAB-CSwin-T: SLA in stages 1 and 2, PRepBN."""
    return _create("cswin_tiny_slab_224", pretrained, **{**_SLAB, **kwargs})


@register_model
def cswin_small_slab_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLAB-CSwin-S."""
    args = {"depths": (2, 4, 32, 2), **_SLAB, **kwargs}
    return _create("cswin_small_slab_224", pretrained, **args)


@register_model
def cswin_tiny_inline_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-CSwin-T: InLine attention in stages 1 and 2."""
    return _create("cswin_tiny_inline_224", pretrained, **{**_INLINE, **kwargs})


@register_model
def cswin_small_inline_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-CSwin-S."""
    args = {"depths": (3, 6, 29, 2), **_INLINE, **kwargs}
    return _create("cswin_small_inline_224", pretrained, **args)


@register_model
def cswin_base_inline_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-CSwin-B."""
    return _create("cswin_base_inline_224", pretrained, **{**_BASE, **_INLINE, **kwargs})


@register_model
def cswin_base_inline_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-CSwin-B on 384 pixels."""
    args = {"img_size": 384, "split_sizes": (1, 2, 12, 12), **_BASE, **_INLINE, **kwargs}
    return _create("cswin_base_inline_384", pretrained, **args)
