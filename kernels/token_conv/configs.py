"""Launch tables of the token convolution.

Keys: (architecture, kernel size); unlisted ones take the row of architecture 0. Size 5 and below
were measured on one H100 80GB HBM3, torch 2.11, triton 3.6, 2026-11-24.
"""

from dataclasses import dataclass

from torch import Tensor

from .._common.launch import architecture, multiprocessors
from .._common.pinning import pin_or


@dataclass(frozen=True)
class Launch:
    """A program takes `columns` x `channels`, `vector` channels a thread, and walks down `rows`."""

    columns: int
    channels: int
    vector: int
    warps: int
    rows: int
    stages: int = 1


Table = dict[tuple[int, int], Launch]

FWD: Table = {
    (0, 5): Launch(8, 64, 2, 4, 16),
    (0, 7): Launch(4, 32, 1, 4, 16),
}
BWD_WEIGHT: Table = {
    (0, 5): Launch(8, 64, 2, 4, 16),
    (0, 7): Launch(4, 32, 1, 4, 16),
}
TABLES: dict[str, Table] = {"conv_fwd": FWD, "conv_bwd_weight": BWD_WEIGHT}
# Beyond, the weights of even one channel do not fit in the registers of a thread.
MAX_SIZE = 7


def launch_of(name: str, tokens: Tensor, size: int) -> Launch:
    """The setting of the kernel `name` for these tokens (B, N, C) and kernels of side `size`."""
    table = TABLES[name]
    for key in (architecture(tokens.get_device()), 0):
        rows = [row for row in table if row[0] == key and row[1] >= size]
        if rows:
            return pin_or(name, table[min(rows)])
    raise AssertionError(f"no launch of {name} for kernel size {size}")


def rows_of(launch: Launch, programs: int, height: int, tokens: Tensor) -> int:
    """Rows a program walks down: fewer than the table says where programs are few."""
    wanted = 8 * multiprocessors(tokens) / max(programs, 1)
    return max(4, min(launch.rows, round(height / max(wanted, 1))))
