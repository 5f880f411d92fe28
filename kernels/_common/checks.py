"""Argument checks shared by the operations; every message reads "`name` must ..., got ..."."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLEMENTATIONS = ("auto", "reference", "triton")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")


def check_tensor(
    name: str, tensor: Tensor, layout: str, *, like: Tensor | None = None, any_dtype: bool = False
) -> None:
    """A floating-point tensor with the dimensions that `layout` names, e.g. "(B, N, C)".

    With `like`, the device must equal that of this tensor, and the dtype too unless `any_dtype`.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
    if tensor.ndim != layout.count(",") + 1:
        raise ValueError(f"`{name}` must have shape {layout}, got {tuple(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"`{name}` must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
        )
    if like is None:
        return
    if tensor.dtype != like.dtype and not any_dtype:
        raise TypeError(f"`{name}` must have dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"`{name}` must be on {like.device}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], layout: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"`{name}` must have shape {layout} = {tuple(expected)}, got {tuple(tensor.shape)}"
        )


def check_grid(grid: Sequence[int], num_tokens: int, what: str = "tokens") -> tuple[int, int]:
    """`(height, width)` of a row-major grid that holds exactly `num_tokens` tokens."""
    if isinstance(grid, int) or len(grid) != 2 or any(side < 1 for side in grid):
        raise ValueError(f"`grid` must be two positive sides (height, width), got {grid!r}")
    height, width = grid
    if height * width != num_tokens:
        raise ValueError(
            f"`grid` must hold the {num_tokens} {what}, got {height} x {width} = {height * width}"
        )
    return height, width
