"""The choices that compose in every family: which attention and which norm, block by block."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple

from ..norm import NORMS, NormFactory, norm_factory

ATTENTIONS = ("softmax", "sla", "inline")

Choice: TypeAlias = str | Sequence[str | Sequence[str]]
BlockChoices: TypeAlias = tuple[tuple[str, ...], ...]


def per_block(
    name: str, value: Choice, choices: Sequence[str], depths: Sequence[int]
) -> BlockChoices:
    """Spreads an option over stages and blocks.

    Args:
        name: of the option, for messages.
        value: one choice for all blocks, one a stage, or for a stage one a block.
        choices: what may be chosen.
        depths: blocks of each stage.

    Returns:
        A tuple of choices a stage.

    Raises:
        TypeError: neither a string nor a sequence.
        ValueError: an unknown choice, or numbers that do not fit `depths`.
    """
    if not isinstance(value, Sequence):
        got = type(value).__name__
        raise TypeError(f"`{name}` must be a string or a sequence of them, got {got}")
    stages = [value] * len(depths) if isinstance(value, str) else list(value)
    fits = len(stages) == len(depths) and all(
        isinstance(stage, str) or (isinstance(stage, Sequence) and len(stage) == depth)
        for stage, depth in zip(stages, depths, strict=False)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must be one choice, one a stage or one a block of stages with"
            f" {tuple(depths)} blocks, got {value!r}"
        )
    spread = tuple(
        (stage,) * depth if isinstance(stage, str) else tuple(stage)
        for stage, depth in zip(stages, depths, strict=True)
    )
    unknown = [choice for stage in spread for choice in stage if choice not in choices]
    if unknown:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {unknown[0]!r}")
    return spread


def attention_choices(value: Choice, depths: Sequence[int]) -> BlockChoices:
    """`per_block` of the option `attn`."""
    return per_block("attn", value, ATTENTIONS, depths)


def norm_choices(value: Choice, depths: Sequence[int], eps: float) -> list[list[NormFactory]]:
    """`per_block` of the option `norm`, as constructors; `eps` is that of the LayerNorms."""
    names = per_block("norm", value, NORMS, depths)
    return [[norm_factory(name, eps) for name in stage] for stage in names]


def patch_grid(
    img_size: int | tuple[int, int], patch_size: int | tuple[int, int]
) -> tuple[int, int]:
    """``(h, w)`` of the patches of an image.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    height, width = to_2tuple(img_size)
    patch = to_2tuple(patch_size)
    if height < patch[0] or width < patch[1]:
        raise ValueError(
            f"`img_size` must be at least one patch of {patch[0]} x {patch[1]} pixels,"
            f" got {height} x {width}"
        )
    return height // patch[0], width // patch[1]


# SLAB resizes the short side before the centre crop, InLine squashes the image into a square.
CROP_MODES = {"slab": "center", "inline": "squash"}


def default_cfg(method: str, size: int, **kwargs: Any) -> dict[str, Any]:
    """A pretrained_cfg with the evaluation transform of one of the papers.

    Args:
        method: ``slab`` or ``inline``.
        size: side of the crop, pixels, out of int(256 / 224 * size).
        kwargs: further entries.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.875,
        "crop_mode": CROP_MODES[method],
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        **kwargs,
    }
