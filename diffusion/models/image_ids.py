"""The token grid that the position ids of FLUX's image tokens describe."""

import torch
from torch import Tensor


def _raster(first: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
    """Ids ``(h * w, 3)`` in float32, row-major, (constant, row, column) from those of `first`."""
    height, width = spatial_shape
    rows, columns = (
        torch.arange(side, device=first.device, dtype=torch.float32) for side in (height, width)
    )
    ids = first.float().repeat(height, width, 1)
    ids[..., 1] += rows[:, None]
    ids[..., 2] += columns
    return ids.flatten(0, 1)


def _is_raster(img_ids: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
    # Rounded alike, because pipelines cast ids to the dtype of the latents: bfloat16 has no odd
    # integers above 256.
    return (_raster(img_ids[0], spatial_shape).to(img_ids.dtype) == img_ids).all()


def grid_of_ids(img_ids: Tensor) -> tuple[int, int]:
    """Sides ``(h, w)`` of the grid of `img_ids` ``(N, 3)``; waits for the device.

    Raises:
        ValueError: the ids do not number a whole grid row by row.
    """
    count = img_ids.shape[0]
    # Only the first row has its row id, in any precision: rounding starts at 257.
    width = int((img_ids[:, 1] == img_ids[0, 1]).sum()) if count else 0
    if width == 0 or count % width or not _is_raster(img_ids, (count // width, width)):
        raise ValueError(
            f"`img_ids` must number a grid row by row, got {count} ids that do not; pass"
            ' joint_attention_kwargs={"spatial_shape": (height, width)}, in tokens'
        )
    return count // width, width


def exact_ids(img_ids: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
    """`img_ids` ``(h * w, 3)`` in float32, without the rounding of half precision on a grid."""
    if img_ids.dtype not in (torch.bfloat16, torch.float16):
        return img_ids
    # Other ids than a grid's stay as they are; decided on the device, without waiting for it.
    is_raster = _is_raster(img_ids, spatial_shape)
    return torch.where(is_raster, _raster(img_ids[0], spatial_shape), img_ids.float())
