"""Launches of a compiled kernel without what Triton repeats in Python at every one of them."""

import copy
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from .boxes import Box

# Boxes that follow on each other with the same tensor, and which of the tensors it is.
Groups: TypeAlias = "list[tuple[int, list[Box]]]"
# Remembered for each tensor that the copy engine sees; more of them start anew.
_ADDRESSES = 128


class DirectLaunch:
    """``launch(tensors, pointers)`` runs a compiled kernel on the current stream.

    Triton's launcher looks for scratch memory, which our kernels have none of, and describes every
    tensor of the copy engine to the driver anew, some 10 us of the host each. What it tells the C
    function behind it follows from the layout and, for the copy engine, from the address, which
    PyTorch's allocator gives out again and again. Where Triton is built as we know it the C
    function is therefore called itself, else its launcher.

    Args:
        compiled: what a call of the kernel returns, with `run`, `function` and `packed_metadata`.
        grid: of programs, three sides.
        driver: Triton's for the current device, to which the launches belong.
        boxes: first arguments, as (which of the tensors, its box).
        only_boxes: so many leading tensors are no argument by themselves.
        rest: arguments after the pointers.
    """

    def __init__(
        self,
        compiled: Any,
        grid: tuple[int, ...],
        driver: Any,
        boxes: "Sequence[tuple[int, Box]]",
        only_boxes: int,
        rest: Sequence[object],
    ) -> None:
        before = (compiled.function, compiled.packed_metadata, None, None, None)
        groups = [(i, [box for _, box in pairs]) for i, pairs in groupby(boxes, lambda x: x[0])]
        self._way = _c_way(compiled, grid, before, groups) or _Way(
            compiled.run, before, False, [(i, _Described(some).at) for i, some in groups]
        )
        # Triton may unload a kernel that nobody has.
        self._compiled = compiled
        self._grid, self._only_boxes, self._rest = grid, only_boxes, tuple(rest)
        self._stream_of, self._device = driver.get_current_stream, driver.get_current_device()

    def __call__(self, tensors: Sequence[Tensor], pointers: list[int]) -> None:
        run, before, packed, boxes = self._way
        # Within a CUDA graph or another stream, the current one is theirs.
        stream = self._stream_of(self._device)
        if boxes:
            arguments: list[Any] = []
            for index, arguments_of in boxes:
                arguments += arguments_of(tensors[index], pointers[index])
            arguments += pointers[self._only_boxes :]
        else:
            arguments = pointers
        if packed:
            run(*self._grid, stream, *before, (*arguments, *self._rest))
        else:
            run(*self._grid, stream, *before, *arguments, *self._rest)


class _Way(NamedTuple):
    """``run(*grid, stream, *before, *arguments)``, `arguments` as one tuple where `packed`."""

    run: Callable[..., object]
    before: tuple[Any, ...]
    packed: bool
    # What boxes on end have for arguments, from their tensor and its address.
    boxes: list[tuple[int, Callable[[Tensor, int], Sequence[Any]]]]


class _Described:
    """Boxes of one tensor as arguments of Triton's launcher."""

    def __init__(self, boxes: "Sequence[Box]") -> None:
        self._boxes = boxes

    def at(self, tensor: Tensor, address: int) -> Sequence[Any]:
        return [box.at(tensor) for box in self._boxes]


class _Expanded(_Described):
    """The same as arguments of the C function, by address: they hold no memory of the tensor, and
    are right again for whatever lies there later, if it has this layout."""

    def __init__(self, boxes: "Sequence[Box]", expand: Callable[..., Sequence[Any]]) -> None:
        super().__init__(boxes)
        self._expand = expand
        self._known: dict[int, Sequence[Any]] = {}

    def at(self, tensor: Tensor, address: int) -> Sequence[Any]:
        found = self._known.get(address)
        if found is None:
            found = self._expand(*super().at(tensor, address))
            if len(self._known) >= _ADDRESSES:
                self._known.clear()
            self._known[address] = found
        return found


def _c_way(
    compiled: Any, grid: tuple[int, ...], before: tuple[Any, ...], groups: Groups
) -> _Way | None:
    """The way around Triton's launcher, None where that is not as in Triton 3.6, 3.7 and 3.8.

    It takes no order of arguments for granted: Triton's own `CudaLauncher` and
    `wrap_handle_tensordesc`, with a function that keeps them in the place of C's, tell what they
    hand on.
    """
    launcher, module = compiled.run, sys.modules.get("triton.backends.nvidia.driver")
    if type(launcher) is not getattr(module, "CudaLauncher", None):
        return None
    try:
        # Scratch memory is found for each launch, and a sanitizer does more around it.
        scratch = (launcher.global_scratch_size, launcher.profile_scratch_size)
        if scratch != (0, 0) or getattr(launcher, "gsan_enabled", False):
            return None
        kept: list[tuple[Any, ...]] = []
        stream, argument = object(), object()
        probe = copy.copy(launcher)
        probe.launch = lambda *arguments: kept.append(arguments)
        probe(*grid, stream, *before, argument)
        *base, last = kept[0]
        packed = last == (argument,)
        if base[:4] != [*grid, stream] or not (packed or last is argument):
            return None
        way = _Way(launcher.launch, tuple(base[4:]), packed, [])
        return _with_boxes(way, module, compiled, base, groups) if groups else way
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
        return None


def _with_boxes(
    way: _Way, module: Any, compiled: Any, base: list[Any], groups: Groups
) -> _Way | None:
    """`way` without Triton's wrapper, which takes descriptors."""
    count = sum(len(boxes) for _, boxes in groups)
    # Each box has its type and what the compiler found for it, in this order.
    types = list(compiled.src.signature.values())[:count]
    found = list(compiled.metadata.tensordesc_meta)
    if len(found) != count or None in found or not all(x.startswith("tensordesc") for x in types):
        return None
    for index, boxes in groups:
        n = len(boxes)
        wrapped = module.wrap_handle_tensordesc(_kept, dict(enumerate(types[:n])), found[:n])
        if wrapped.__code__ is not way.run.__code__ or _launcher_in(wrapped) is not _kept:
            return None
        way.boxes.append((index, _Expanded(boxes, _expansion(wrapped, base, way.packed)).at))
        types, found = types[n:], found[n:]
    return way._replace(run=_launcher_in(way.run))


def _kept(*arguments: Any) -> tuple[Any, ...]:
    return arguments


def _launcher_in(wrapped: Any) -> Any:
    """What Triton's wrapper calls."""
    cells = dict(zip(wrapped.__code__.co_freevars, wrapped.__closure__, strict=True))
    return cells["launcher"].cell_contents


def _expansion(
    wrapped: Callable[..., tuple[Any, ...]], base: list[Any], packed: bool
) -> Callable[..., Sequence[Any]]:
    """What stands for descriptors before the C function."""
    if packed:
        return lambda *descriptors: wrapped(*base, descriptors)[-1]
    return lambda *descriptors: wrapped(*base, *descriptors)[len(base) :]
