"""How an operator of the namespace `lintra` is registered: schema, kernel launcher, shapes."""

from collections.abc import Callable
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

    def launch(*args: Any) -> Any:
        return getattr(import_module(module), function)(*args)

    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    # The CPU runs kernels in Triton's interpreter; `api` lets nothing else come here.
    torch.library.impl(qualified, ("cuda", "cpu"), launch)
    torch.library.register_fake(qualified, fake)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
