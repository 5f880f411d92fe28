"""Launch tables of local attention.

Keys: (architecture, bytes of an element, width = larger of D and E, rounded up); never the grid or
the radius. Unlisted architectures take the row of architecture 0, which fits the 99 KB of shared
memory that a program has on consumer cards.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._common.launch import architecture, multiprocessors
from .._common.pinning import pin_or

MAX_HEAD_DIM = 128
# Squares of distances on the grid stay below 2^31, see `triton_blocks.far_outside`.
MAX_SIDE = 16384


@dataclass(frozen=True)
class Launch:
    """A program owns a tile of `own` (rows, columns) and visits tiles of `other`."""

    own: tuple[int, int]
    other: tuple[int, int]
    warps: int
    stages: int

    @property
    def own_size(self) -> int:
        return self.own[0] * self.own[1]

    @property
    def other_size(self) -> int:
        return self.other[0] * self.other[1]

    def own_tiles(self, height: int, width: int) -> int:
        return -(-height // self.own[0]) * -(-width // self.own[1])

    def blocks(self, head_dim: int, value_dim: int) -> dict[str, Any]:
        """Constants of a kernel, and how to launch it."""
        return {
            "OWN_Y": self.own[0], "OWN_X": self.own[1],
            "OTHER_Y": self.other[0], "OTHER_X": self.other[1],
            "D": head_dim, "BLOCK_D": channel_block(head_dim),
            "E": value_dim, "BLOCK_E": channel_block(value_dim),
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


Table = dict[tuple[int, int, int], Launch]

FWD: Table = {
    (0, 2, 64): Launch((8, 8), (8, 8), 4, 2),
    (0, 2, 128): Launch((8, 8), (8, 8), 4, 2),
    (0, 4, 64): Launch((8, 8), (4, 8), 4, 2),
    (0, 4, 128): Launch((4, 8), (4, 8), 4, 1),
    (90, 2, 128): Launch((8, 8), (8, 8), 4, 3),
}
BWD_DQ: Table = {
    (0, 2, 64): Launch((8, 8), (8, 8), 4, 2),
    (0, 2, 128): Launch((8, 8), (4, 8), 4, 2),
    (0, 4, 64): Launch((4, 8), (4, 8), 4, 1),
    (0, 4, 128): Launch((4, 8), (4, 4), 4, 1),
    (90, 2, 128): Launch((8, 8), (8, 8), 4, 3),
}
BWD_DKV: Table = {
    (0, 2, 64): Launch((8, 8), (8, 8), 4, 2),
    (0, 2, 128): Launch((8, 8), (4, 8), 4, 2),
    (0, 4, 64): Launch((4, 8), (4, 8), 4, 1),
    (0, 4, 128): Launch((4, 8), (4, 4), 4, 1),
    (90, 2, 128): Launch((8, 8), (8, 8), 4, 3),
}
TABLES: dict[str, Table] = {"local_fwd": FWD, "local_bwd_dq": BWD_DQ, "local_bwd_dkv": BWD_DKV}


def launch_of(name: str, tensor: Tensor, width: int) -> Launch:
    """The setting of the kernel `name` for tensors like this one and heads of `width` channels."""
    table = TABLES[name]
    size = tensor.element_size()
    for key in (architecture(tensor.get_device()), 0):
        rows = [row for row in table if row[0] == key and row[1] == size and row[2] >= width]
        if rows:
            return pin_or(name, table[min(rows)])
    raise AssertionError(f"no launch of {name} for {tensor.dtype}, width {width}")


def channel_block(channels: int) -> int:
    """A power of two that a dot takes."""
    return max(16, 1 << (channels - 1).bit_length())


def parts_of(length: int, block: int, programs: int, tensor: Tensor) -> tuple[int, int]:
    """How many ranges of how many tokens a dense pass over `length` of them is cut into: about four
    programs a multiprocessor, so that what partial results take does not grow with the length."""
    wanted = pin_or("local_parts", math.ceil(4 * multiprocessors(tensor) / max(programs, 1)))
    blocks = -(-length // block)
    share = -(-blocks // max(1, min(wanted, blocks // 4))) * block
    return -(-length // share), share


def disc_limit(height: int, width: int, radius: float) -> int:
    """The integer that squared distances inside the disc stay below, no larger than needed."""
    clipped = min(radius, height + width)  # has a finite square
    return min(math.ceil(clipped**2), (height - 1) ** 2 + (width - 1) ** 2 + 1)
