"""Swin with linear attention and foldable norms: SLAB, InLine and PRepBN, on timm's Swin.

Liu et al. 2021 (arXiv:2103.14030); Guo et al. 2024, SLAB (arXiv:2405.11582); Han et al. 2024,
InLine (arXiv:2412.06590).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple, to_ntuple
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging, SwinTransformer
from torch import nn

from ..fold import Foldable, NormSite
from ..norm import NormFactory
from .building import build_staged_backbone, record_input_size
from .options import Choice, attention_choices, default_cfg, norm_choices, patch_grid
from .patch_embedding import FoldablePatchEmbed
from .readout import FoldableReadout, exempt_from_decay
from .swin_block import LinearSwinBlock


class FoldablePatchMerging(Foldable, PatchMerging):
    """timm's patch merging, whose norm folds into its reduction."""

    def norm_sites(self) -> list[NormSite]:
        return [NormSite(self, "norm", readers=[self.reduction])]


def _stage_windows(value: Any, num_stages: int) -> list[tuple[int, int]]:
    """``(h, w)`` a stage, from one side or (h, w) for all, or one of these a stage."""
    is_pair = not isinstance(value, int) and len(value) == 2 and isinstance(value[0], int)
    stages = [value] * num_stages if isinstance(value, int) or is_pair else value
    return [to_2tuple(window) for window in stages]


class LinearSwinTransformer(FoldableReadout, SwinTransformer):
    """timm's SwinTransformer with linear attention and foldable norms, chosen block by block.

    Linear blocks attend over the whole map; softmax blocks are timm's, in windows of
    `window_size`. Patch merging has the norm of its stage's first block, the embedding that of
    the first and the final norm that of the last block of all.

    Args:
        attn: ``softmax``, ``sla`` or ``inline``; one for all, one a stage or one a block.
        norm: ``ln``, ``prepbn`` or ``repbn``; one for all, one a stage or one a block.
        norm_eps: eps of the LayerNorms.
        linear_window_size: side of windows for the linear blocks, in tokens, which must divide
            their maps; None for the whole map.
        linear_window_shift: every other linear block shifts its windows, without a mask, as those
            of InLine's comparison of window sizes do.
        sla_kernel_size: side of the depthwise convolution of SLA blocks, odd.
        window_size: of the softmax blocks.
        kwargs: see timm's SwinTransformer.

    Raises:
        ValueError: an unknown choice, an image smaller than a patch, windows that do not divide.
    """

    patch_embed: Any
    layers: Any
    init_weights: Callable[..., None]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        attn: Choice = "softmax",
        norm: Choice = "ln",
        norm_eps: float = 1e-5,
        linear_window_size: int | None = None,
        linear_window_shift: bool = False,
        sla_kernel_size: int = 5,
        head_dim: int | None = None,
        always_partition: bool = False,
        strict_img_size: bool = True,
        dynamic_img_size: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        weight_init: str = "",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        kinds = attention_choices(attn, depths)
        norms = norm_choices(norm, depths, norm_eps)
        patch_grid(img_size, patch_size)
        strict_img_size = strict_img_size and not dynamic_img_size
        # timm builds all but the blocks: a stage of its own would have one attention and one norm,
        # and a table of 3136 ** 2 relative positions for a window that covers the map.
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depths=(0,) * len(depths),
            num_heads=num_heads,
            window_size=window_size,
            strict_img_size=strict_img_size,
            embed_layer=FoldablePatchEmbed,
            norm_layer=norms[0][0],
            weight_init="skip",
            **kwargs,
            **dd,
        )
        self.norm = norms[-1][-1](self.num_features, **dd)
        self.fc_norm = nn.Identity()
        windows = _stage_windows(window_size, len(depths))
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        num_stages = len(depths)
        per_stage = to_ntuple(num_stages)
        for index, stage in enumerate(self.layers):
            self._fill_stage(
                stage,
                norms[index],
                [
                    {"kind": kind, "norm_layer": layer, "drop_path": rate}
                    for kind, layer, rate in zip(
                        kinds[index], norms[index], rates[index], strict=True
                    )
                ],
                num_heads=num_heads[index],
                head_dim=per_stage(head_dim)[index],
                mlp_ratio=per_stage(mlp_ratio)[index],
                window_size=windows[index],
                linear_window_size=linear_window_size,
                linear_window_shift=linear_window_shift,
                sla_kernel_size=sla_kernel_size,
                always_partition=always_partition,
                dynamic_mask=not strict_img_size,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                **dd,
            )
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    @staticmethod
    def _fill_stage(
        stage: Any, norms: list[NormFactory], blocks: list[dict[str, Any]], **common: Any
    ) -> None:
        """Gives a stage without blocks its blocks, and its patch merging the norm of the first."""
        dd: dict[str, Any] = {"device": common["device"], "dtype": common["dtype"]}
        merging = stage.downsample
        if isinstance(merging, PatchMerging):
            stage.downsample = FoldablePatchMerging(
                merging.dim, merging.out_dim, norm_layer=norms[0], **dd
            )
            dim = merging.out_dim
        else:
            dim = stage.dim
        stage.depth = len(blocks)
        shift = tuple(side // 2 for side in common["window_size"])
        linear_shift = common.pop("linear_window_shift")
        stage.blocks = nn.Sequential(
            *[
                LinearSwinBlock(
                    dim,
                    input_resolution=stage.output_resolution,
                    shift_size=shift if index % 2 else 0,
                    linear_window_shift=linear_shift and index % 2 == 1,
                    **block,
                    **common,
                )
                for index, block in enumerate(blocks)
            ]
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: position tables and RepBN skips."""
        return exempt_from_decay(self)

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        """See timm; the tables of the linear blocks are resized as well."""
        patch_grid(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        super().set_input_size(img_size=img_size, patch_size=patch_size, **kwargs)
        if not hasattr(self, "_ref_window_sizes"):  # timm < 1.0.31 records nothing
            grid, ratio = self.patch_embed.grid_size, kwargs.get("window_ratio", 8)
            window = kwargs.get("window_size") or tuple(side // ratio for side in grid)
            record_input_size(self, self.patch_embed.img_size, window_size=window)


_create = partial(build_staged_backbone, LinearSwinTransformer)


def _cfg(method: str, size: int = 224) -> dict[str, Any]:
    pool = (size // 32, size // 32)
    return default_cfg(method, size, classifier="head.fc", fixed_input_size=True, pool_size=pool)


default_cfgs = generate_default_cfgs(
    {
        "swin_tiny_prepbn_patch4_window7_224.slab_in1k": _cfg("slab"),
        "swin_tiny_slab_patch4_window56_224.slab_in1k": _cfg("slab"),
        "swin_small_slab_patch4_window56_224.slab_in1k": _cfg("slab"),
        "swin_base_slab_patch4_window56_224.slab_in1k": _cfg("slab"),
        "swin_tiny_inline_patch4_window56_224.inline_in1k": _cfg("inline"),
        "swin_small_inline_patch4_window56_224.inline_in1k": _cfg("inline"),
        "swin_base_inline_patch4_window56_224.inline_in1k": _cfg("inline"),
        "swin_base_inline_patch4_window96_384.inline_in1k": _cfg("inline", 384),
    }
)

_TINY: dict[str, Any] = {"depths": (2, 2, 6, 2)}
_SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = {"depths": (2, 2, 18, 2), "embed_dim": 128, "num_heads": (4, 8, 16, 32)}
_SLAB: dict[str, Any] = {"attn": ("sla", "sla", "softmax", "softmax"), "norm": "prepbn"}
_II = ("inline", "inline")
# Stage 3 of Swin-B: two InLine blocks, then windows.
_INLINE_BASE: dict[str, Any] = {"attn": (*_II, _II + ("softmax",) * 16, "softmax")}


@register_model
def swin_tiny_prepbn_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Swin-T with RepBN alone, as its authors trained it; ``norm="prepbn"`` for the schedule."""
    args = {**_TINY, "norm": "repbn", **kwargs}
    return _create("swin_tiny_prepbn_patch4_window7_224", pretrained, **args)


@register_model
def swin_tiny_slab_patch4_window56_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLAB-Swin-T: SLA in stages 1 and 2, PRepBN."""
    args = {**_TINY, **_SLAB, **kwargs}
    return _create("swin_tiny_slab_patch4_window56_224", pretrained, **args)


@register_model
def swin_small_slab_patch4_window56_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLAB-Swin-S."""
    args = {**_SMALL, **_SLAB, **kwargs}
    return _create("swin_small_slab_patch4_window56_224", pretrained, **args)


@register_model
def swin_base_slab_patch4_window56_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLAB-Swin-B."""
    args = {**_BASE, **_SLAB, **kwargs}
    return _create("swin_base_slab_patch4_window56_224", pretrained, **args)


@register_model
def swin_tiny_inline_patch4_window56_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-Swin-T: InLine attention in stages 1 to 3."""
    args = {**_TINY, "attn": (*_II, "inline", "softmax"), **kwargs}
    return _create("swin_tiny_inline_patch4_window56_224", pretrained, **args)


@register_model
def swin_small_inline_patch4_window56_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-Swin-S: InLine attention in stages 1 and 2."""
    args = {**_SMALL, "attn": (*_II, "softmax", "softmax"), **kwargs}
    return _create("swin_small_inline_patch4_window56_224", pretrained, **args)


@register_model
def swin_base_inline_patch4_window56_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-Swin-B: InLine attention in stages 1 and 2 and the first two blocks of stage 3."""
    args = {**_BASE, **_INLINE_BASE, **kwargs}
    return _create("swin_base_inline_patch4_window56_224", pretrained, **args)


@register_model
def swin_base_inline_patch4_window96_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InLine-Swin-B on 384 pixels."""
    args = {"window_size": 12, **_BASE, **_INLINE_BASE, **kwargs}
    return _create("swin_base_inline_patch4_window96_384", pretrained, **args)
