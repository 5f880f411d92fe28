"""Launch tables of linear attention: with which blocks a kernel runs.

Rows of architecture 90 were measured on one H100 80GB HBM3, torch 2.11, triton 3.6, 2026-11-24; the
others are chosen to fit, as are those of the kernels for Hopper that keep or sum wide states.

Keys: (architecture, bytes of an element, width = larger of D and E, rounded up); the token count
is never one. Unlisted architectures take the row of architecture 0, which fits small memories.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._common.launch import architecture, multiprocessors
from .._common.pinning import pin_or

MAX_HEAD_DIM = 320
# Above this width one program cannot hold a state, its tiles and their sums.
MAX_NARROW_DIM = 128


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
    (90, 2, 32): Launch(64, 1, 1),
    (90, 2, 64): Launch(128, 4, 1),
    (90, 2, 96): Launch(64, 4, 1),
    (90, 2, 128): Launch(64, 8, 3),
    (90, 2, 192): Launch(64, 8, 2),
}
FWD_MOMENTS: Table = {
    (0, 2, 64): Launch(64, 4, 2),
    (0, 2, 320): Launch(32, 8, 2),
    (0, 4, 320): Launch(16, 8, 1),
    (90, 2, 128): Launch(64, 4, 3),
    (90, 2, 192): Launch(64, 8, 3),
    (90, 2, 320): Launch(64, 4, 3),
}
# Places in its ring as 227 KB hold.
FWD_MOMENTS_HOPPER: Table = {(90, 2, 288): Launch(64, 4, 4), (90, 2, 320): Launch(64, 4, 3)}
# Tokens of a tile that passes by a state in shared memory, and bytes of that for both.
ROWS_BLOCK = 64
SHARED_BYTES = 224 * 1024
FWD_APPLY: Table = {
    (0, 2, 64): Launch(64, 4, 2),
    (0, 2, 128): Launch(64, 8, 2),
    (0, 4, 128): Launch(32, 8, 1),
    (90, 2, 128): Launch(64, 4, 3),
}
FWD_APPLY_WIDE: Table = {
    (0, 2, 320): Launch(64, 8, 2, 32),
    (0, 4, 320): Launch(16, 8, 1, 16),
    (90, 2, 320): Launch(128, 8, 3),
}
FWD_QUADRATIC: Table = {
    (0, 2, 128): Launch(64, 4, 1),
    (0, 2, 320): Launch(64, 8, 1, 32),
    (0, 4, 320): Launch(16, 8, 1, 16),
    (90, 2, 128): Launch(64, 4, 2),
    (90, 2, 320): Launch(64, 4, 2, 32),
}
# As many keys at a time and places in their rings as 227 KB hold.
FWD_QUADRATIC_HOPPER: Table = {
    (90, 2, 128): Launch(128, 8, 3),
    (90, 2, 288): Launch(128, 8, 2),
    (90, 2, 320): Launch(128, 8, 3, 32),
}
BWD_FUSED: Table = {
    (0, 2, 64): Launch(64, 4, 1),
    (0, 2, 128): Launch(32, 8, 1),
    (0, 4, 128): Launch(16, 8, 1),
    (90, 2, 32): Launch(32, 1, 1),
    (90, 2, 64): Launch(64, 4, 2),
    (90, 2, 128): Launch(32, 8, 1),
}
BWD_QUERIES: Table = {
    (0, 2, 64): Launch(64, 4, 1),
    (0, 2, 128): Launch(32, 8, 1),
    (0, 4, 128): Launch(16, 8, 1),
    (90, 2, 64): Launch(64, 4, 2),
    (90, 2, 96): Launch(64, 8, 1),
    (90, 2, 128): Launch(32, 8, 2),
}
BWD_QUERIES_KEYS_FIRST: Table = BWD_QUERIES | {(90, 2, 64): Launch(64, 4, 3)}
BWD_KEYS: Table = {
    (0, 2, 64): Launch(64, 4, 1),
    (0, 2, 128): Launch(32, 8, 1),
    (0, 4, 128): Launch(16, 8, 1),
    (90, 2, 64): Launch(64, 4, 3),
    (90, 2, 96): Launch(64, 4, 2),
    (90, 2, 128): Launch(64, 8, 2),
}
BWD_DQ_WIDE: Table = {
    (0, 2, 320): Launch(64, 8, 2, 32),
    (0, 4, 320): Launch(16, 8, 1, 16),
    (90, 2, 320): Launch(64, 8, 3),
}
BWD_DKV_WIDE: Table = {
    (0, 2, 320): Launch(64, 8, 2, 32),
    (0, 4, 320): Launch(16, 8, 1, 16),
    (90, 2, 320): Launch(64, 8, 3),
}
# Two places in each of two rings: more than 288 channels leave memory for halved tiles only.
BWD_QUADRATIC_HOPPER: Table = {
    (90, 2, 288): Launch(128, 8, 2),
    (90, 2, 320): Launch(128, 8, 3, 32),
}
TABLES: dict[str, Table] = {
    "fwd_fused": FWD_FUSED,
    "fwd_moments": FWD_MOMENTS,
    "fwd_moments_hopper": FWD_MOMENTS_HOPPER,
    "fwd_apply": FWD_APPLY,
    "fwd_apply_wide": FWD_APPLY_WIDE,
    "fwd_quadratic": FWD_QUADRATIC,
    "fwd_quadratic_hopper": FWD_QUADRATIC_HOPPER,
    "bwd_fused": BWD_FUSED,
    "bwd_queries": BWD_QUERIES,
    "bwd_queries_keys_first": BWD_QUERIES_KEYS_FIRST,
    "bwd_keys": BWD_KEYS,
    "bwd_quadratic_hopper_queries": BWD_QUADRATIC_HOPPER,
    "bwd_quadratic_hopper_keys": BWD_QUADRATIC_HOPPER,
    "bwd_dq_wide": BWD_DQ_WIDE,
    "bwd_dkv_wide": BWD_DKV_WIDE,
}


def launch_of(name: str, tensor: Tensor, width: int) -> Launch:
    """The setting of the kernel `name` for tensors like this one and heads of `width` channels."""
    table = TABLES[name]
    size = tensor.element_size()
    arch = architecture(tensor.get_device())
    for key in (arch, 0):
        rows = [row for row in table if row[0] == key and row[1] == size and row[2] >= width]
        if rows:
            launch = table[min(rows)]
            if tensor.dtype == torch.float16 and width > 64:
                # The state side of float16 is float32, twice the memory of bfloat16's.
                launch = replace(launch, block=max(16, launch.block // 2), stages=1, step=32)
            return pin_or(name, launch)
    raise AssertionError(f"no launch of {name} for {tensor.dtype}, width {width}")


def kernel_feature(feature_map: str, tensor: Tensor) -> str:
    """The form of a feature map that the kernels take: NVIDIA's have a relu of two halves."""
    packed = tensor.is_cuda and torch.version.hip is None and tensor.element_size() == 2
    return "relu_packed" if feature_map == "relu" and packed else feature_map


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


# Kernels that hold this side of a state whole where that wastes less than a second part costs.
_WHOLE = {
    ("fwd_moments", "d"): (torch.bfloat16, torch.float16, torch.float32),
    ("fwd_apply", "e"): (torch.bfloat16,),
    ("bwd_keys", "d"): (torch.bfloat16,),
}

# Kernels whose sums over tokens take the keys first, by architecture: the widths (over, up to)
# where that was measured to be faster, bfloat16.
_KEYS_FIRST = {
    (90, "fwd_moments"): (0, 96),
    (90, "bwd_queries"): (48, 64),
    (90, "bwd_fused"): (48, 64),
}


def keys_first(kernel: str, tensor: Tensor, width: int) -> bool:
    """Whether `kernel` forms its sums as in `triton_keys_first`; never in float16, which shifts its
    values."""
    over, up_to = _KEYS_FIRST.get((architecture(tensor.get_device()), kernel), (0, 0))
    chosen = tensor.dtype == torch.bfloat16 and over < width <= up_to
    return pin_or("keys_first", chosen) and tensor.dtype != torch.float16


def parts_of(width: int, side: str, kernel: str, dtype: torch.dtype) -> tuple[int, int]:
    """Two powers of two that together hold `width` channels of the `side` d or e of a state, each a
    size that a dot takes."""
    whole = max(16, _power_of_two(width))
    first = whole // 2
    rest = max(16, _power_of_two(width - first)) if width > first else 0
    may = width <= 128 and dtype in _WHOLE.get((kernel, side), ())
    one = first < 16 or first + rest >= whole or may
    return pin_or(f"{kernel}_{side}_parts", (whole, 0) if one else (first, rest))


def value_block(head_dim: int, value_dim: int, element_size: int) -> int:
    """Value columns a program of the moments kernel takes: all that its registers hold."""
    limit = 128 if head_dim <= 128 else 96 if head_dim <= 192 else 32
    if element_size == 4:
        limit = min(limit, 64)
    limit = pin_or("value_columns", limit)
    if value_dim <= limit:
        return value_dim
    fewest = -(-value_dim // limit)
    for blocks in range(fewest, 2 * fewest):
        if value_dim % (8 * blocks) == 0:
            return value_dim // blocks
    return limit


def splits_of(tokens: int, programs: int, tensor: Tensor, launch: Launch) -> tuple[int, int]:
    """How many ranges of how many tokens: about two programs a multiprocessor, since more would
    only write more partial states."""
    wanted = math.ceil(1.9 * multiprocessors(tensor) / max(programs, 1))
    most = max(1, tokens // (4 * launch.block))
    splits = pin_or("splits", max(1, min(wanted, most)))
    blocks = -(-tokens // launch.block)
    share = -(-blocks // splits) * launch.block
    return -(-tokens // share), share


def even_splits_of(
    tokens: int, programs: int, tensor: Tensor, block: int, cost: int
) -> tuple[int, int]:
    """As `splits_of`, for programs that have a multiprocessor to themselves: as many ranges as
    leave the fewest tiles of `block` tokens to the busiest one, where a start and an end count as
    3 tiles and what more than one range costs as `cost`."""

    def tiles(splits: int) -> int:
        own = -(-blocks // splits) + 3 + (cost if splits > 1 else 0)
        return -(-programs * splits // multiprocessors(tensor)) * own

    blocks = -(-tokens // block)
    splits = pin_or("splits", min(range(1, min(blocks, 64) + 1), key=tiles))
    share = -(-blocks // splits) * block
    return -(-tokens // share), share


def resident_columns(width: int, columns: int, tensor: Tensor) -> tuple[int, int]:
    """Of a state with rows of `width` numbers, how many columns a program keeps in shared memory,
    and how many tiles of tokens beside them; (0, 0) where it has no room."""

    def stages(own: int) -> int:
        padded = sum(parts_of(own, "n", "rows_hopper", tensor.dtype))
        rest = SHARED_BYTES - 2 * padded * (width + 2 * ROWS_BLOCK)
        return min(4, rest // (2 * ROWS_BLOCK * width))

    width = sum(parts_of(width, "k", "rows_hopper", tensor.dtype))
    blocks = [n for n in range(1, columns // 16 + 1) if columns % (8 * n) == 0]
    for wanted in (3, 2):
        for n in blocks:
            if columns // n <= 192 and stages(columns // n) >= wanted:
                return columns // n, stages(columns // n)
    return 0, 0


def rows_warps(with_gains: bool) -> int:
    """Warps that prepare tiles, beside the eight that multiply them."""
    # 16384 tokens, 4 heads of 288: eight take 39.2 us where there are gains to find, four 42.1;
    # without gains or features 32.8 and 27.5, since the others have fewer registers (H200).
    return pin_or("rows_warps", 8 if with_gains else 4)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 keeps the range of the sums, float16 does not: its states stay float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
