"""How normalisation and rotation are cut into programs."""

from dataclasses import dataclass

from .._common.pinning import pin_or

# Channels of a head. Others than powers of two would need a second mask, and no model has them.
HEAD_DIMS = (16, 32, 64, 128, 256)
# Half of what was best for `ada_layer_norm`: beside its row a thread holds two numbers of a table
# for each. Not tuned yet.
_ELEMENTS = 2048
_WARPS = 4
# Programs of the gradients a multiprocessor, each with sums of its own. Not tuned yet.
PROGRAMS = 4


@dataclass(frozen=True)
class Launch:
    """How the kernel is cut into programs.

    Args:
        rows: heads of tokens, one after the other, that a program takes.
        warps: of a program.
    """

    rows: int
    warps: int


def launch_of(head_dim: int) -> Launch:
    """The setting for heads of so many channels."""
    return pin_or("rotary_rms_norm", Launch(_ELEMENTS // head_dim, _WARPS))
