"""Signatures, checks and choice of implementation of adaptive norms and gated sums."""

import torch
from torch import Tensor

from .._common.checks import IMPLEMENTATIONS, check_choice, check_shape, check_tensor
from .._common.launch import takes_kernel, why_no_kernel
from .._common.operators import needs_gradient, reason_of_transforms
from .._common.plans import Memo, Plans
from . import configs
from .ops import ada_layer_norm_triton, gated_ada_layer_norm_triton, gated_add_triton
from .reference import (
    ada_layer_norm_reference,
    gated_ada_layer_norm_reference,
    gated_add_reference,
)

_TOKENS = ("x", "update")  # (B, N, C); the others are parameters, (B, C)
_ARGUMENTS = {
    "ada_layer_norm": ("x", "scale", "shift"),
    "gated_ada_layer_norm": ("x", "update", "gate", "scale", "shift"),
    "gated_add": ("x", "update", "gate"),
}


def why_not_triton(name: str, x: Tensor) -> str | None:
    """The reason why `impl="triton"` of the call `name` cannot run on `x`, None if it can."""
    reason = why_no_kernel(x)
    if reason is None and name != "gated_add" and not 1 <= x.shape[-1] <= configs.MAX_CHANNELS:
        reason = f"its kernel takes 1 to {configs.MAX_CHANNELS} channels, got {x.shape[-1]}"
    return reason


def _checked(
    tensors: tuple[Tensor, ...], name: str, eps: float | None, impl: str
) -> tuple[str | None, Memo]:
    """Raises what the arguments deserve; why the kernel cannot run, None if it can."""
    check_choice("impl", impl, IMPLEMENTATIONS)
    x = tensors[0]
    check_tensor("x", x, "(B, N, C)")
    for argument, tensor in zip(_ARGUMENTS[name], tensors, strict=True):
        layout = "(B, N, C)" if argument in _TOKENS else "(B, C)"
        check_tensor(argument, tensor, layout, like=x, any_dtype=True)
        expected = x.shape if argument in _TOKENS else (x.shape[0], x.shape[2])
        check_shape(argument, tensor, expected, layout)
    return why_not_triton(name, x), Memo()


_CALLS = Plans(_checked)


def _chosen(name: str, eps: float | None, impl: str, *tensors: Tensor) -> tuple[bool, Memo]:
    """Whether the call `name` goes to the kernel, and the memo of its launch."""
    reason, memo = _CALLS(tensors, name, eps, impl)
    if reason is None and needs_gradient(*tensors) and tensors[0].shape[-1] > configs.MAX_CHANNELS:
        reason = f"the kernel of its gradients takes up to {configs.MAX_CHANNELS} channels"
    reason = reason or reason_of_transforms()
    if impl == "triton" and reason is not None:
        raise NotImplementedError(f"`impl` must not be 'triton' for {name}: {reason}")
    kernel = takes_kernel(impl, tensors[0], reason)
    if kernel and impl == "auto" and torch.compiler.is_compiling():
        # Gradients and sums are left to be fused. What inductor makes of a norm, one more pass over
        # the tokens, takes 1.5 to 2 times as long: 57 and 71 us for 16384 tokens of 1152 channels,
        # with a gate and the sum before it, where the kernel takes 25 and 42 (H200, 2026-11-30).
        kernel = name != "gated_add" and not needs_gradient(*tensors)
    return kernel, memo


def ada_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """``y = LN(x) * (1 + scale) + shift``, ``LN(x) = (x - mean(x)) / sqrt(var(x) + eps)``.

    The adaptive normalisation of DiT (Peebles and Xie 2023, arXiv:2212.09748, adaLN): over the last
    dimension, without weights, with the biased variance; scale and shift are those of the sample.

    Args:
        x: ``(B, N, C)``, any floating dtype; copied unless contiguous.
        scale: ``(B, C)``, any floating dtype; a view, as of one of six chunks, is read in place.
        shift: ``(B, C)``, likewise.
        eps: added to the variance.
        impl: ``auto``, ``reference`` (PyTorch) or ``triton``. ``auto`` takes the Triton kernel on
            CUDA for float16, bfloat16 and float32, up to 8192 channels; not under `torch.func` or
            forward-mode derivatives, nor, with a gradient, while torch.compile traces, which fuses
            the reference with its neighbours. The kernels differentiate once.

    Returns:
        ``(B, N, C)`` in ``x.dtype``. All is float32 inside (float64 for float64 inputs), also under
        autocast, and rounded once: PyTorch's own chain rounds LN(x) and 1 + scale as well.

    Raises:
        ValueError: shapes or devices disagree, an unknown `impl`.
        TypeError: dtypes that are not floating point.
        NotImplementedError: ``impl="triton"`` cannot run here.
    """
    kernel, memo = _chosen("ada_layer_norm", eps, impl, x, scale, shift)
    if kernel:
        return ada_layer_norm_triton(x, scale, shift, eps, memo)
    return ada_layer_norm_reference(x, scale, shift, eps)


def gated_ada_layer_norm(
    x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor,
    *, eps: float = 1e-6, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``h = x + gate * update``, then ``y = LN(h) * (1 + scale) + shift``, in one pass over both.

    The end of one branch of adaLN-Zero and the start of the next, see `ada_layer_norm`.

    Args:
        x: ``(B, N, C)``, any floating dtype; copied unless contiguous.
        update: ``(B, N, C)``, any floating dtype; copied unless contiguous.
        gate: ``(B, C)``, any floating dtype, read in place as `scale` and `shift` are.
        scale: ``(B, C)``, see `ada_layer_norm`.
        shift: ``(B, C)``, see `ada_layer_norm`.
        eps: added to the variance.
        impl: see `ada_layer_norm`.

    Returns:
        `h` and `y`, ``(B, N, C)`` in ``x.dtype``. The sum is float32 inside and rounded once; what
        is normalised is the rounded sum, as if `ada_layer_norm` were called on `h`.

    Raises:
        ValueError: shapes or devices disagree, an unknown `impl`.
        TypeError: dtypes that are not floating point.
        NotImplementedError: ``impl="triton"`` cannot run here.
    """
    kernel, memo = _chosen("gated_ada_layer_norm", eps, impl, x, update, gate, scale, shift)
    if kernel:
        return gated_ada_layer_norm_triton(x, update, gate, scale, shift, eps, memo)
    return gated_ada_layer_norm_reference(x, update, gate, scale, shift, eps)


def gated_add(x: Tensor, update: Tensor, gate: Tensor, *, impl: str = "auto") -> Tensor:
    """``h = x + gate * update``: one branch of adaLN-Zero added to its tokens.

    The gated sum of DiT (Peebles and Xie 2023, arXiv:2212.09748, adaLN-Zero), with one gate for all
    tokens of a sample. Where `ada_layer_norm` follows, `gated_ada_layer_norm` is both in one pass.

    Args:
        x: ``(B, N, C)``, any floating dtype; copied unless contiguous.
        update: ``(B, N, C)``, any floating dtype; copied unless contiguous.
        gate: ``(B, C)``, any floating dtype; a view, as of one of six chunks, is read in place.
        impl: ``auto``, ``reference`` (PyTorch) or ``triton``. ``auto`` takes the Triton kernel on
            CUDA for float16, bfloat16 and float32 where a gradient is asked for, else from 16
            million elements of `x`, below which its launch costs the host more than it saves; not
            while torch.compile traces, which fuses the reference with its neighbours, nor under
            `torch.func` or forward-mode derivatives. The kernels differentiate once.

    Returns:
        ``(B, N, C)`` in ``x.dtype``, float32 inside (float64 for float64 inputs), also under
        autocast, and rounded once, as is `torch.addcmul` of one dtype.

    Raises:
        ValueError: shapes or devices disagree, an unknown `impl`.
        TypeError: dtypes that are not floating point.
        NotImplementedError: ``impl="triton"`` cannot run here.
    """
    kernel, memo = _chosen("gated_add", None, impl, x, update, gate)
    pays = needs_gradient(x, update, gate) or x.numel() >= configs.GATED_ADD_MIN_ELEMENTS
    if kernel and (impl == "triton" or pays):
        return gated_add_triton(x, update, gate, memo)
    return gated_add_reference(x, update, gate)
