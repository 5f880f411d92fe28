"""Launch tables of local attention.

Keys: (architecture, bytes of an element, width = larger of D and E, rounded up); never the grid or
the radius. Unlisted architectures take the row of architecture 0, which fits the 99 KB of shared
memory that a program has on consumer cards.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._common.launch import (
    architecture,
    copy_engine_takes_strides,
    knows_gluon,
    multiprocessors,
)
from .._common.pinning import pin_or

CUDNN_ATTENTION = "_scaled_dot_product_cudnn_attention"
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
    (90, 2, 128): Launch((8, 8), (8, 8), 4, 2),
}
BWD_DKV: Table = {
    (0, 2, 64): Launch((8, 8), (8, 8), 4, 2),
    (0, 2, 128): Launch((8, 8), (4, 8), 4, 2),
    (0, 4, 64): Launch((4, 8), (4, 8), 4, 1),
    (0, 4, 128): Launch((4, 8), (4, 4), 4, 1),
    (90, 2, 128): Launch((8, 8), (4, 8), 4, 3),
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


def way_of(name: str, tensors: Iterable[Tensor], scale: float) -> str:
    """hopper: kernels for the copy engine and the tensor cores of one architecture, for tensors
    whose memory is `aligned`; general: any. `name` is fwd or bwd."""
    tensors = list(tensors)
    first = tensors[0]
    hopper = (
        architecture(first.get_device()) == 90
        and first.element_size() == 2
        and scale > 0
        and all(x.shape[3] in (64, 128) and copy_engine_takes_strides(x) for x in tensors)
        and knows_gluon()
    )
    return pin_or(f"local_{name}_way", "hopper" if hopper else "general")


def hopper_stages(name: str, head_dim: int, value_dim: int) -> int:
    """Places in the ring of tiles: what 227 KB hold beside own tokens and output."""
    wide = head_dim + value_dim > 128
    return pin_or(f"local_{name}_hopper_stages", {"fwd": 4, "bwd": 4}[name] if wide else 6)


def prefix_way(query: Tensor, value: Tensor) -> str:
    """sdpa: cuDNN's dense attention, measured faster on Hopper, for tensors whose memory
    is `aligned`; general: our own kernel."""
    sdpa = (
        architecture(query.get_device()) == 90
        and query.element_size() == 2
        and query.shape[3] == value.shape[3]
        and query.shape[3] % 8 == 0
        and torch.backends.cudnn.is_available()
        and hasattr(torch, CUDNN_ATTENTION)
    )
    return pin_or("local_prefix_way", "sdpa" if sdpa else "general")


def sdpa_parts(query: Tensor) -> int:
    """Ranges of keys of the prefix queries in cuDNN: of one sample, four keep a GPU busier than
    one."""
    batch, num_tokens = query.shape[:2]
    parts = pin_or("local_sdpa_parts", 4)
    return parts if batch == 1 and num_tokens % parts == 0 else 1


def even_parts(programs: int, tiles: int, processors: int) -> int:
    """How many parts the visits of dense programs are cut into: of up to six, so that partial sums
    stay small, those that keep all processors busy to the end."""
    most = max(1, min(6, tiles))

    def busy(parts: int) -> float:
        return programs * parts / (-(-programs * parts // processors) * processors)

    return pin_or("local_hopper_parts", max(range(1, most + 1), key=busy))


def heads_together(heads: int, width: int, limit: int, token_bytes: int) -> int:
    """Heads whose items take turns: those of one tile are read from memory side by side, as long as
    the rows that one row of tiles sees stay in the cache (half of 50 MB on an H100) for the next.

    `token_bytes` are those of the tokens of a head that items visit.
    """
    rows = 2 * math.isqrt(limit) + 8
    fitting = [n for n in (1, 2, 4, 8) if n * rows * width * token_bytes <= 24e6]
    return pin_or("local_hopper_together", math.gcd(heads, max(fitting, default=1)))
