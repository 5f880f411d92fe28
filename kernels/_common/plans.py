"""What follows from shapes and strides, remembered: eager mode waits for the host."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .pinning import is_pinned

Plan = TypeVar("Plan")
# Layouts that are remembered; a program with more of them starts anew.
_LIMIT = 4096
_UNKNOWN: Any = object()


class Memo:
    """Holds the plan that follows on another one, for the same tensors and options: the owner of
    that one hands it on, and no layout is looked up twice."""

    def __init__(self) -> None:
        self.plan: Any = _UNKNOWN


class Plans(Generic[Plan]):
    """``plans(tensors, *options)`` is ``make(tensors, *options)``, made once for each layout.

    Args:
        make: may use everything of the tensors but their values: shapes, strides, dtypes and
            devices, and the tables of `configs`. What it raises is raised, every time. Pinned
            settings are never remembered, nor is anything while torch.compile traces.

    With ``memo=`` the plan is that of the memo, once there is one.
    """

    def __init__(self, make: Callable[..., Plan]) -> None:
        self._make = make
        self._known: dict[tuple[object, ...], Plan] = {}

    def __call__(
        self, tensors: tuple[Tensor | None, ...], *options: object, memo: Memo | None = None
    ) -> Plan:
        if memo is None:
            return self._plan(tensors, options)
        if memo.plan is _UNKNOWN:
            memo.plan = self._plan(tensors, options)
        return memo.plan

    def _plan(self, tensors: tuple[Tensor | None, ...], options: tuple[object, ...]) -> Plan:
        if torch.compiler.is_compiling() or is_pinned():
            return self._make(tensors, *options)
        try:
            key = (
                options,
                *[x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors],
            )
            plan = self._known.get(key, _UNKNOWN)
        except (AttributeError, RuntimeError, TypeError):
            # No tensors, tensors without strides, symbolic shapes or a list among the options.
            key, plan = None, _UNKNOWN
        if plan is _UNKNOWN:
            plan = self._make(tensors, *options)
            if key is not None:
                if len(self._known) >= _LIMIT:
                    self._known.clear()
                self._known[key] = plan
        return plan
