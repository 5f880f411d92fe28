"""Aspect-ratio buckets: the sizes to which images of every shape are brought."""

import re
from collections.abc import Sequence

from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

Size = tuple[int, int]  # height, width in pixels

# The tables of PixArt, which are also those of its pipelines' `use_resolution_binning`.
PIXART_TABLES = {
    256: ASPECT_RATIO_256_BIN,
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
}


def parse_buckets(choice: str | None, resolution: int, multiple: int) -> list[Size]:
    """The sizes that `choice` names, as ``(height, width)`` in pixels, sorted by shape.

    Args:
        choice: None for the one square of side `resolution`; ``pixart`` for PixArt's table at it;
            or sizes such as ``"512,512;384,672"``, as in diffusers' training scripts.
        resolution: side of the square, pixels.
        multiple: what heights and widths must be multiples of.

    Raises:
        ValueError: no such table, text that is no list of sizes, or a size that is no multiple.
    """
    if choice is None:
        sizes = [(resolution, resolution)]
    elif choice == "pixart":
        if resolution not in PIXART_TABLES:
            raise ValueError(
                f"`resolution` must be one of {', '.join(map(str, PIXART_TABLES))} for the buckets"
                f" of PixArt, got {resolution}"
            )
        sizes = [(int(h), int(w)) for h, w in PIXART_TABLES[resolution].values()]
    else:
        if not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*(;\s*\d+\s*,\s*\d+\s*)*;?\s*", choice):
            raise ValueError(
                "`aspect_ratio_buckets` must be 'pixart' or sizes such as '512,512;384,672',"
                f" got {choice!r}"
            )
        numbers = [int(number) for number in re.findall(r"\d+", choice)]
        sizes = list(zip(numbers[::2], numbers[1::2], strict=True))
    for height, width in sizes:
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"`aspect_ratio_buckets` must have sides that are multiples of {multiple}, got"
                f" {height} x {width}"
            )
    return sorted(set(sizes), key=lambda size: (size[0] / size[1], size))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """Number of the bucket whose height / width is nearest to that of `size`.

    Nearest by difference of the ratios, as `classify_height_width_bin` of diffusers has it, so
    that a picture is trained in the bucket in which a pipeline would draw it.
    """
    ratio = size[0] / size[1]
    return min(range(len(buckets)), key=lambda i: abs(buckets[i][0] / buckets[i][1] - ratio))


def fit_to_bucket(image: Tensor, bucket: Size, interpolation: str = "bicubic") -> Tensor:
    """Resizes uint8 ``(C, H, W)`` until it covers the bucket, and crops the middle."""
    height, width = image.shape[-2:]
    if (height, width) == bucket:
        return image
    factor = max(bucket[0] / height, bucket[1] / width)
    size = [max(round(height * factor), bucket[0]), max(round(width * factor), bucket[1])]
    image = F.resize(image, size, interpolation=InterpolationMode(interpolation), antialias=True)
    return F.center_crop(image, list(bucket))
