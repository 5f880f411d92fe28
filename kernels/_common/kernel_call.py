"""A launch of a Triton kernel that waits less for the host from the second time on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from .direct_launch import DirectLaunch

if TYPE_CHECKING:
    from .boxes import Box

# Triton takes pointers to this boundary for granted where it met one when it compiled.
_ALIGNMENT = 16
# In these releases a compiled kernel is run with grid, stream, function, metadata, no metadata and
# hooks of this launch, and all arguments of the kernel. Others launch in the ordinary way.
_RELEASES = ("3.6", "3.7", "3.8")


class KernelCall:
    """``call(*tensors)`` is ``kernel[grid](*tensors, *numbers, **constants)``.

    Triton spends some 20 us on finding the compiled kernel that fits the arguments: their types,
    which integers are 1 or multiples of 16, which pointers are aligned. All but the last follows
    from the layout. The compiled kernel of the first call is therefore kept, and launched itself
    whenever all pointers are aligned.

    Args:
        kernel: of `triton.jit`.
        grid: of programs, one to three sides.
        numbers: arguments after the tensors.
        constants: the rest by name, `constexpr` arguments and options of the launch.
        boxes: arguments before all others, as (which of the tensors, its box).
        only_boxes: so many leading tensors are no argument by themselves.

    A call belongs to one layout, that of `Plans`: tensors of the same shapes, strides, dtypes and
    device every time, and this device is the current one.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        numbers: Sequence[object],
        constants: Mapping[str, object],
        boxes: "Sequence[tuple[int, Box]]" = (),
        only_boxes: int = 0,
    ) -> None:
        self._kernel = kernel
        self._grid = tuple(grid)
        self._numbers = tuple(numbers)
        self._constants = constants
        self._boxes = tuple(boxes)
        self._only_boxes = only_boxes
        # None before the first, and where there is none.
        self._direct: DirectLaunch | None = None

    def __call__(self, *tensors: Tensor) -> None:
        pointers = [x.data_ptr() for x in tensors]
        # One tail that is not zero shows in the sum of all bits.
        bits = 0
        for pointer in pointers:
            bits |= pointer
        aligned = bits % _ALIGNMENT == 0
        if aligned and self._direct is not None and not _watched():
            self._direct(tensors, pointers)
            return
        arguments = (
            *(box.of(tensors[index]) for index, box in self._boxes),
            *tensors[self._only_boxes :],
            *self._numbers,
        )
        compiled = self._kernel[self._grid](*arguments, **self._constants)
        if aligned and self._direct is None:
            self._direct = self._prepared(compiled, len(arguments))

    def _prepared(self, compiled: Any, count: int) -> DirectLaunch | None:
        """The direct launch of `compiled`, None where there is none: the interpreter compiles
        nothing, AMD's kernels are also compiled for the size of a tensor's memory."""
        parts = [getattr(compiled, name, None) for name in ("run", "function", "packed_metadata")]
        names = getattr(self._kernel, "arg_names", ())[count:]
        known = triton.__version__.startswith(tuple(f"{release}." for release in _RELEASES))
        if None in parts or not known or torch.version.hip is not None:
            return None
        if any(name not in self._constants for name in names):
            return None
        rest = (*self._numbers, *(self._constants[name] for name in names))
        grid = (*self._grid, 1, 1)[:3]
        driver = triton.runtime.driver.active
        return DirectLaunch(compiled, grid, driver, self._boxes, self._only_boxes, rest)


def _watched() -> bool:
    """Whether a profiler has hooked into Triton's launches, which the ordinary way tells it."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
