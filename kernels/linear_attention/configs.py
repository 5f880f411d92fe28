"""Launch tables of linear attention: which way runs, and with which blocks.

Keys: (architecture, bytes of an element, width = larger of D and E, rounded up); the token count
is never one. Unlisted architectures take the row of architecture 0, which fits small memories.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._common.launch import architecture, multiprocessors
from .._common.pinning import pin_or

MAX_HEAD_DIM = 320
# Above this width one program cannot hold a state, its tiles and their sums.
MAX_FUSED_DIM = 128


@dataclass(frozen=True)
class Launch:
    """`block` tokens a tile, `step` channels a step of a reduction, software pipeline `stages`."""

    block: int
    warps: int
    stages: int
    step: int = 64


Table = dict[tuple[int, int, int], Launch]

FWD_FUSED: Table = {
    (0, 2, 64): Launch(64, 4, 2),
    (0, 2, 128): Launch(64, 8, 2),
    (0, 4, 128): Launch(32, 8, 1),
    (90, 2, 32): Launch(64, 1, 3),
    (90, 2, 64): Launch(64, 4, 3),
    (90, 2, 128): Launch(64, 8, 3),
}
FWD_MOMENTS: Table = {
    (0, 2, 64): Launch(64, 4, 2),
    (0, 2, 320): Launch(32, 8, 2),
    (0, 4, 320): Launch(16, 8, 1),
    (90, 2, 64): Launch(64, 4, 4),
    (90, 2, 128): Launch(64, 8, 4),
    (90, 2, 320): Launch(64, 8, 3),
}
FWD_APPLY: Table = {
    (0, 2, 128): Launch(64, 4, 2),
    (0, 2, 320): Launch(64, 8, 2, 32),
    (0, 4, 320): Launch(16, 8, 1, 16),
    (90, 2, 64): Launch(128, 4, 2),
    (90, 2, 128): Launch(128, 8, 2),
    (90, 2, 320): Launch(128, 8, 3),
}
BWD_FUSED: Table = {
    (0, 2, 64): Launch(64, 4, 1),
    (0, 2, 128): Launch(32, 8, 1),
    (0, 4, 128): Launch(16, 8, 1),
    (90, 2, 32): Launch(64, 4, 2),
    (90, 2, 64): Launch(64, 4, 2),
    (90, 2, 128): Launch(64, 8, 1),
}
BWD_DQ: Table = {
    (0, 2, 128): Launch(64, 4, 2),
    (0, 2, 320): Launch(64, 8, 2, 32),
    (0, 4, 320): Launch(16, 8, 1, 16),
    (90, 2, 64): Launch(128, 4, 2),
    (90, 2, 128): Launch(64, 4, 2),
    (90, 2, 320): Launch(64, 8, 3),
}
BWD_DKV: Table = {
    (0, 2, 128): Launch(64, 4, 2),
    (0, 2, 320): Launch(64, 8, 2, 32),
    (0, 4, 320): Launch(16, 8, 1, 16),
    (90, 2, 64): Launch(128, 4, 2),
    (90, 2, 128): Launch(64, 4, 2),
    (90, 2, 320): Launch(64, 8, 3),
}
TABLES: dict[str, Table] = {
    "fwd_fused": FWD_FUSED,
    "fwd_moments": FWD_MOMENTS,
    "fwd_apply": FWD_APPLY,
    "bwd_fused": BWD_FUSED,
    "bwd_dq": BWD_DQ,
    "bwd_dkv": BWD_DKV,
}


def launch_of(name: str, tensor: Tensor, width: int) -> Launch:
    """The setting of the kernel `name` for tensors like this one and heads of `width` channels."""
    table = TABLES[name]
    size = tensor.element_size()
    arch = architecture(tensor.get_device())
    for key in (arch, 0):
        rows = [row for row in table if row[0] == key and row[1] == size and row[2] >= width]
        if rows:
            return pin_or(name, table[min(rows)])
    raise AssertionError(f"no launch of {name} for {tensor.dtype}, width {width}")


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def parts_of(width: int) -> tuple[int, int]:
    """Two powers of two that together hold `width` channels, each a size that a dot takes."""
    whole = max(16, _power_of_two(width))
    first = whole // 2
    rest = max(16, _power_of_two(width - first)) if width > first else 0
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def value_block(head_dim: int, value_dim: int, element_size: int) -> int:
    """Value columns a program of the moments kernel takes: all that its registers hold."""
    limit = 128
    if head_dim > 128:
        limit = 128 if head_dim > 192 and value_dim % 96 else 96
    if element_size == 4:
        limit = min(limit, 64)
    if value_dim <= limit:
        return value_dim
    fewest = -(-value_dim // limit)
    for blocks in range(fewest, 2 * fewest):
        if value_dim % (8 * blocks) == 0:
            return value_dim // blocks
    return limit


def runs_in_one_launch(name: str, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether one program a head fills the device well enough, and can hold a whole state."""
    batch, _, heads, head_dim = query.shape
    if max(head_dim, value.shape[3]) > MAX_FUSED_DIM:
        return False
    tokens = max(query.shape[1], key.shape[1])
    waves = batch * heads / multiprocessors(query)
    # Few heads leave processors idle, which only a short run of tokens forgives.
    return pin_or(f"{name}_one_launch", waves >= 2.5 or tokens <= 256)


def splits_of(tokens: int, programs: int, tensor: Tensor, block: int) -> int:
    """Ranges of tokens so that about four programs a multiprocessor run at once."""
    wanted = -(-4 * multiprocessors(tensor) // max(programs, 1))
    most = max(1, tokens // (4 * block))
    return pin_or("splits", max(1, min(wanted, most)))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 keeps the range of the sums, float16 does not: its states stay float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
