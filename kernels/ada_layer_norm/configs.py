"""How adaptive layer normalisation and gated sums are cut into programs."""

from dataclasses import dataclass

from .._common.pinning import pin_or

MAX_CHANNELS = 8192
# What four warps hold, rows padded to a power of two: 32 a thread were the fastest or within 3 % of
# it at 768, 1152 and 3072 channels, with and without a gate, of 86 launches (H100, 2026-11-24). Two
# powers of two to a row, 1024 + 128 for 1152, lost everywhere: the small one changes the layout of
# the parameters.
_ELEMENTS = 4096
_WARPS = 4
_MAX_ROWS = 64
# Elements of a sum from which its kernel saves the GPU more than its launch costs the host beyond
# PyTorch's. On an H200 `addcmul` takes 63 us for 18.9 million in bfloat16, where a copy of as many
# bytes would take 27; the host there takes 28 us to launch the kernel, 18 for `addcmul`.
GATED_ADD_MIN_ELEMENTS = 16_000_000


@dataclass(frozen=True)
class Launch:
    """How the kernel is cut into programs.

    Args:
        rows: tokens a program takes, of one sample: its scale, shift and gate are read once.
        warps: of a program.
    """

    rows: int
    warps: int


def launch_of(channels: int) -> Launch:
    """The setting for tokens of so many channels."""
    width = 1 << (channels - 1).bit_length()
    rows = min(max(_ELEMENTS // width, 1), _MAX_ROWS)
    return pin_or("ada_layer_norm", Launch(rows, _WARPS if width <= _ELEMENTS else 2 * _WARPS))


@dataclass(frozen=True)
class BwdLaunch:
    """How the kernel of gradients is cut into programs.

    Args:
        rows: tokens of a step of a program, of one sample.
        warps: of a program.
        programs: a multiprocessor, over which the tokens are split.
        stages: steps whose tokens are on their way at a time.
    """

    rows: int
    warps: int
    programs: int
    stages: int = 1


# Of an asynchronous copy's tokens, which even the smallest GPUs that take such copies have.
_BUFFER_BYTES = 64 * 1024


def bwd_launch_of(channels: int, itemsize: int, *, norm: bool, gated: bool) -> BwdLaunch:
    """The setting for tokens of so many channels of `itemsize` bytes.

    Two programs of four warps a multiprocessor, whose next tokens are copied while they compute,
    were the fastest or within 4 % of it at 768, 1152 and 3072 channels, of 105 launches each (H200,
    2026-11-30). More programs have more sums to add up, and wait for each other's registers.

    Args:
        channels: C.
        itemsize: bytes of an element.
        norm: there is a norm, not only a sum.
        gated: there is a gate.
    """
    width = 1 << (channels - 1).bit_length()
    if norm:
        rows = min(max(512 // width, 1), _MAX_ROWS)
        warps = min(max(rows * width // (512 if gated else 1024), 1), 16)
        # What a step reads; one step less is on its way than there are stages.
        step = rows * width * itemsize * (4 if gated else 2)
        stages = 1 + min(_BUFFER_BYTES // step, 2)
        launch = BwdLaunch(rows, warps, max(8 // warps, 1), stages)
    else:
        rows = min(max(2048 // width, 1), _MAX_ROWS)
        warps = 4 if width <= 2048 else 8 if width <= 4096 else 16
        launch = BwdLaunch(rows, warps, 16 // warps, 1)
    return pin_or("ada_layer_norm_bwd", launch)


@dataclass(frozen=True)
class SumLaunch:
    """How the kernel of a sum alone is cut into programs.

    Args:
        elements: a program takes, of one sample; a power of two.
        warps: of a program.
    """

    elements: int
    warps: int


def sum_launch() -> SumLaunch:
    """The setting for any tokens: two loads of 16 bytes a thread and half-precision tensor.

    Not tuned yet.
    """
    return pin_or("gated_add", SumLaunch(2048, 4))
