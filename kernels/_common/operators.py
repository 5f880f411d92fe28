"""How an operator of the namespace `lintra` is registered, and how its gradient is called."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from .plans import Memo

try:  # what `is_dispatched` asks; without an answer every call is dispatched
    from torch._C import (
        _are_functorch_transforms_active,
        _get_tracing_state,
        _len_torch_dispatch_stack,
    )
    from torch.autograd import _profiler_enabled
except ImportError:
    _ANSWERED = False
else:
    _ANSWERED = True

_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_PLAIN_NUMBERS = frozenset({int, float, bool, str, type(None)})


class Operator:
    """``lintra::<name>``: ``operator(*arguments)`` by the dispatcher of PyTorch, or without it.

    A `memo` goes to the launcher where that is called directly, see `Plans`.

    The dispatcher costs the host some 10 us a call, which eager mode waits for. Where it would do
    nothing but call the launcher, the launcher is called.
    """

    def __init__(self, name: str, launcher: Callable[[], Callable[..., Any]]) -> None:
        self._registered = getattr(torch.ops.lintra, name).default
        self._launcher = launcher

    def __call__(self, *arguments: Any, memo: Memo | None = None) -> Any:
        # A constant to torch.compile, which so traces the operator.
        if torch.compiler.is_compiling() or is_dispatched(arguments):
            return self._registered(*arguments)
        launch = self._launcher()
        return launch(*arguments) if memo is None else launch(*arguments, memo=memo)


def _is_watched(arguments: tuple[Any, ...]) -> bool:
    """Whether anything stands between a call and its kernel."""
    return (
        not _ANSWERED
        or has_torch_function(arguments)  # subclasses and function modes
        or bool(_len_torch_dispatch_stack())  # FlopCounterMode, fake tensors, make_fx
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # tangents
        or _get_tracing_state() is not None  # torch.jit.trace
    )


def reason_of_transforms() -> str | None:
    """Why no kernel may run under what stands around the call, None if one may.

    An operator would lose tangents without a word, and `torch.func` knows none of ours.
    """
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0 or (_ANSWERED and _are_functorch_transforms_active()):
        return "its kernels know neither torch.func nor forward-mode derivatives"
    return None


def unless_transformed(kernel: bool, impl: str, name: str) -> bool:
    """`kernel`, the choice for the call `name`, but the reference under what no kernel serves.

    Raises:
        NotImplementedError: then, if `impl` asks for the kernels.
    """
    if not kernel or (reason := reason_of_transforms()) is None:
        return kernel
    if impl == "triton":
        raise NotImplementedError(f"`impl` must not be 'triton' for {name}: {reason}")
    return False


def is_dispatched(arguments: tuple[Any, ...]) -> bool:
    """Whether the dispatcher has more to do with a call than to run the kernel of the device."""
    # The profiler shows operators by their names.
    if _is_watched(arguments) or _profiler_enabled():
        return True
    in_graph = torch.is_grad_enabled()
    for x in arguments:
        kind = type(x)
        if kind in _PLAIN_TENSORS:
            # No memory of its own (meta, functional, zero), other values than those in memory, or
            # a place in a graph.
            if not x.data_ptr() or x.is_neg() or (in_graph and x.requires_grad):
                return True
        elif kind not in _PLAIN_NUMBERS:
            return True
    return False


def are_plain(*tensors: torch.Tensor) -> bool:
    """Whether these are nothing but their values, and nobody watches what is done with them."""
    return not _is_watched(tensors) and all(
        type(x) in _PLAIN_TENSORS and x.data_ptr() and not x.is_neg() for x in tensors
    )


def register(name: str, schema: str, launcher: str, fake: Callable[..., Any]) -> Operator:
    """Defines ``lintra::<name>``.

    Args:
        name: of the operator.
        schema: arguments and results, as `torch.library.define` takes them.
        launcher: "module:function" that computes it; imported, and triton with it, at the first
            call.
        fake: gives empty results of the right shape; serves meta tensors and tracing.
    """
    qualified = f"lintra::{name}"
    module, function = launcher.split(":")

    @cache
    def resolved() -> Callable[..., Any]:
        return getattr(import_module(module), function)

    def launch(*args: Any) -> Any:
        return resolved()(*args)

    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    # The CPU runs kernels in Triton's interpreter; `api` lets nothing else come here.
    torch.library.impl(qualified, ("cuda", "cpu"), launch)
    torch.library.register_fake(qualified, fake)
    return Operator(name, resolved)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    # First what is one question: inference asks it for every operation.
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class _FirstDerivative(torch.autograd.Function):
    """Calls `operator`, whose results have no derivative and say so when asked for one.

    `once_differentiable` would detach them silently where the incoming gradient needs none.
    """

    @staticmethod
    def forward(ctx: Any, name: str, operator: Callable[..., Any], *arguments: Any) -> Any:
        ctx.name = name
        return operator(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"`{ctx.name}` must be differentiated only once, got a second derivative"
        )


def first_derivative(name: str, operator: Callable[..., Any], *arguments: Any) -> Any:
    """`operator(*arguments)` in the backward pass of the operation `name`.

    Grad mode is on there only if a second derivative may follow; torch.compile, which has none,
    cannot trace a function inside a backward pass.
    """
    if torch.is_grad_enabled():
        return _FirstDerivative.apply(name, operator, *arguments)
    return operator(*arguments)
