"""Signature, checks and choice of implementation of layer normalisation."""

import torch
from torch import Tensor

from .._common.checks import IMPLEMENTATIONS, check_choice, check_shape, check_tensor
from .._common.launch import takes_kernel, why_no_kernel
from .._common.operators import needs_gradient, reason_of_transforms
from .._common.plans import Memo, Plans
from .ops import layer_norm_triton
from .reference import layer_norm_reference

# PyTorch gives each token a block of threads, which pays where tokens are wide. 192 channels were
# measured; beyond this power of two nothing is known.
MAX_CHANNELS = 256
# Tokens from which the kernel saves the GPU more than its launch costs the host beyond PyTorch's:
# about 1 ns a token against some 40 us, H100, 2026-11-24.
MIN_TOKENS = 32768


def why_not_triton(x: Tensor) -> str | None:
    """The reason why `impl="triton"` cannot run on such a tensor, None if it can."""
    reason = why_no_kernel(x)
    if reason is None and not 1 <= x.shape[-1] <= MAX_CHANNELS:
        reason = f"its kernel takes 1 to {MAX_CHANNELS} channels, got {x.shape[-1]}"
    return reason


def _checked(
    tensors: tuple[Tensor, Tensor, Tensor], eps: float, impl: str
) -> tuple[str | None, bool, Memo]:
    """Raises what the arguments deserve; why the kernel cannot run, None if it can, and whether it
    runs where no gradient is asked for."""
    check_choice("impl", impl, IMPLEMENTATIONS)
    x, weight, bias = tensors
    dimensions = max(x.ndim, 1) if isinstance(x, Tensor) else 1
    check_tensor("x", x, "(" + "N, " * (dimensions - 1) + "C)")
    channels = (x.shape[-1],)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor(name, parameter, "(C)", like=x, any_dtype=True)
        check_shape(name, parameter, channels, "(C)")
    reason = why_not_triton(x)
    kernel = takes_kernel(impl, x, reason)
    if impl == "auto" and kernel:
        # What is traced is never remembered.
        kernel = not torch.compiler.is_compiling() and x.numel() >= MIN_TOKENS * x.shape[-1]
    return reason, kernel, Memo()


_CALLS = Plans(_checked)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension.

    Ba et al. 2016 (arXiv:1607.06450), Eq. 3-4, with the biased variance, as PyTorch's.

    Args:
        x: ``(..., C)``, any floating dtype.
        weight: ``(C)``, any floating dtype.
        bias: ``(C)``, any floating dtype.
        eps: added to the variance.
        impl: ``auto``, ``reference`` (PyTorch) or ``triton``. ``auto`` takes the Triton kernel on
            CUDA for float16, bfloat16 and float32, from 32768 tokens, up to 256 channels, where no
            gradient is asked for; not while torch.compile traces, which fuses the reference with
            its neighbours.

    Returns:
        The shape and dtype of `x`; statistics are float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or devices disagree, an unknown `impl`.
        TypeError: dtypes that are not floating point.
        NotImplementedError: ``impl="triton"`` cannot run here.
    """
    reason, kernel, memo = _CALLS((x, weight, bias), eps, impl)
    if needs_gradient(x, weight, bias):
        reason, kernel = "its kernel has no gradient", False
    elif (transformed := reason_of_transforms()) is not None:
        reason, kernel = transformed, False
    if impl == "triton" and reason is not None:
        raise NotImplementedError(f"`impl` must not be 'triton' for layer_norm: {reason}")
    if kernel:
        return layer_norm_triton(x, weight, bias, eps, memo)
    return layer_norm_reference(x, weight, bias, eps)
