"""Whether a module may be computed without being called."""

from torch import Tensor, nn
from torch.nn.modules import module as every_module


def on_gpu(tokens: Tensor) -> bool:
    """Whether the kernels that compute modules together run; one place, for tests to say yes."""
    return tokens.is_cuda


def has_global_hooks() -> bool:
    """Whether something happens when any module at all is called, or its gradients come."""
    return bool(
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    )


def is_unhooked(module: nn.Module) -> bool:
    """Whether nothing happens when `module` is called but its own forward and its gradient."""
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not has_global_hooks()
        and "forward" not in module.__dict__  # where accelerate puts its hooks
    )


def is_untouched(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling `module` is the forward of `kind` with its own weight, and nothing else.

    Not so where adapters or quantisation have put something else in its place, or where hooks
    (offloading, layerwise casting) bring its weight when it is called.
    """
    return type(module) is kind and type(module.weight) is nn.Parameter and is_unhooked(module)
