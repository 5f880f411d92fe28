"""What a launcher works out from shapes and strides, remembered: eager mode waits for the host."""

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from .pinning import is_pinned

Plan = TypeVar("Plan")
# Layouts that are remembered; a program with more of them starts anew.
_LIMIT = 4096


class Plans(Generic[Plan]):
    """``plans(tensors, *options)`` is ``make(tensors, *options)``, made once for each layout.

    Args:
        make: may use everything of the tensors but their values: shapes, strides, dtypes and
            devices, and the tables of `configs`. Pinned settings are never remembered.
    """

    def __init__(self, make: Callable[..., Plan]) -> None:
        self._make = make
        self._known: dict[tuple[object, ...], Plan] = {}

    def __call__(self, tensors: tuple[Tensor | None, ...], *options: object) -> Plan:
        if is_pinned():
            return self._make(tensors, *options)
        layouts = [
            None if x is None else (x.shape, x.stride(), x.dtype, x.get_device()) for x in tensors
        ]
        key = (*layouts, *options)
        plan = self._known.get(key)
        if plan is None:
            if len(self._known) >= _LIMIT:
                self._known.clear()
            plan = self._known[key] = self._make(tensors, *options)
        return plan
