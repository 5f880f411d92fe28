"""How an operator of the namespace `lintra` is registered, and how its gradient is called."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch


def register(name: str, schema: str, launcher: str, fake: Callable[..., Any]) -> None:
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


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
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
