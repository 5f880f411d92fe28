"""Launch table of adaptive layer normalisation.

Keys: channels; others take the row of the next key above. Not measured yet: chosen so that a thread
reads sixteen bytes at a time and holds what ptxas gives 64 to 96 registers.
"""

from dataclasses import dataclass

from .._common.pinning import pin_or


@dataclass(frozen=True)
class Launch:
    """How the kernel is cut into programs.

    Args:
        rows: tokens a program takes, of one sample: its scale, shift and gate are read once.
        warps: of a program.
        pieces: 2 holds a row as the largest power of two in it and one for the rest, 1 as the next
            power of two above.
    """

    rows: int
    warps: int
    pieces: int = 2


LAUNCHES: dict[int, Launch] = {
    64: Launch(64, 4),
    128: Launch(32, 4),
    256: Launch(16, 4),
    512: Launch(8, 4),
    1536: Launch(4, 4),
    2048: Launch(2, 4),
    4096: Launch(1, 4),
    8192: Launch(1, 8),
}
MAX_CHANNELS = max(LAUNCHES)


def launch_of(channels: int) -> Launch:
    """The setting for tokens of so many channels."""
    return pin_or("ada_layer_norm", LAUNCHES[min(key for key in LAUNCHES if key >= channels)])


def pieces_of(channels: int, pieces: int) -> tuple[int, int]:
    """Powers of two that together hold a row; the second is 0 where the first does."""
    whole = 1 << (channels - 1).bit_length()
    first = whole // 2
    if pieces == 1 or first == 0:
        return whole, 0
    rest = 1 << (channels - first - 1).bit_length()
    return (whole, 0) if rest == first else (first, rest)
