"""Launch tables of the token convolution.

Keys: (architecture, kernel size); unlisted ones take the row of architecture 0. Size 5 was measured
on one H100 80GB HBM3, torch 2.11, triton 3.6, 2026-11-24, and its neighbours follow it.
"""

from dataclasses import dataclass
from functools import cache

from torch import Tensor

from .._common.launch import architecture, multiprocessors
from .._common.pinning import pin_or


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut into programs.

    Args:
        columns: widths of a tile to choose from; its columns wait in registers side by side.
        lanes: channels a program takes, over samples where a sample has fewer.
        vector: channels a thread reads at once.
        warps: of a program.
        programs: that run on a multiprocessor at a time, which the registers decide.
        registers: at most, of a thread; None leaves it to the compiler.
    """

    columns: tuple[int, ...]
    lanes: int
    vector: int
    warps: int
    programs: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What only some launches pass to Triton."""
        return {} if self.registers is None else {"maxnreg": self.registers}


Table = dict[tuple[int, int], Launch]

FWD: Table = {
    (0, 3): Launch((4, 7, 8), 64, 2, 1, 16, 128),
    (0, 5): Launch((4, 7, 8), 64, 2, 1, 12, 168),
    (0, 7): Launch((4,), 32, 1, 1, 12, 168),
}
BWD_WEIGHT: Table = {
    (0, 3): Launch((4, 7, 8), 64, 2, 1, 12, 168),
    (0, 5): Launch((4, 7, 8), 64, 2, 1, 8),
    (0, 7): Launch((4,), 32, 1, 1, 8),
}
TABLES: dict[str, Table] = {"conv_fwd": FWD, "conv_bwd_weight": BWD_WEIGHT}
# Of the kernel that adds partial gradients up.
REDUCE_ROWS, REDUCE_FILTERS = 128, 32
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


def columns_of(launch: Launch, width: int) -> int:
    """The tile that leaves the fewest columns empty, the widest of equals."""
    return min(launch.columns, key=lambda columns: (-(-width // columns) * columns, -columns))


def slots_of(launch: Launch, tokens: Tensor) -> int:
    """Programs that run at a time. One more starts another wave, most of which is idle."""
    return max(1, launch.programs * multiprocessors(tokens))


@cache
def rows_of(slots: int, programs: int, height: int, size: int) -> int:
    """Rows a program walks down, so that the waves of programs together take the fewest steps:
    `programs` are those of whole columns, and a range of rows reads a border above and below."""

    def steps(ranges: int) -> int:
        border = 2 * (size // 2) if ranges > 1 else 0
        return -(-programs * ranges // slots) * (-(-height // ranges) + border)

    ranges = min(range(1, max(1, height // 4) + 1), key=steps)
    return -(-height // ranges)


@cache
def groups_of(slots: int, programs: float, batch: int) -> int:
    """Samples that are summed by themselves while `programs` sum one: as few as take no more
    steps, since each writes its partial sums."""

    def steps(rounds: int) -> tuple[int, int]:
        waves = -(-(-(-batch // rounds) * programs) // slots)
        return int(waves) * rounds, -rounds

    fewest = int(-(-batch * programs // slots))
    rounds = min(range(1, max(1, min(batch, fewest + 1)) + 1), key=steps)
    return -(-batch // rounds)
