"""Signature, checks and choice of implementation of normalisation and rotation."""

import torch
from torch import Tensor

from .._common.checks import IMPLEMENTATIONS, check_choice, check_shape, check_tensor
from .._common.launch import takes_kernel, why_no_kernel
from .._common.operators import needs_gradient, reason_of_transforms
from .._common.plans import Memo, Plans
from .configs import HEAD_DIMS
from .ops import rotary_rms_norm_triton
from .reference import rotary_rms_norm_reference


def why_not_triton(query: Tensor) -> str | None:
    """The reason why `impl="triton"` cannot run on such a tensor, None if it can."""
    reason = why_no_kernel(query)
    if reason is None and query.shape[-1] not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        reason = f"its kernel takes heads of {known} channels, got {query.shape[-1]}"
    return reason


def _checked(tensors: tuple[Tensor, ...], eps: float, impl: str) -> tuple[str | None, Memo]:
    """Raises what the arguments deserve; why the kernel cannot run, None if it can."""
    check_choice("impl", impl, IMPLEMENTATIONS)
    query, key, query_weight, key_weight, cosines, sines = tensors
    check_tensor("query", query, "(B, N, H, D)")
    num_tokens, head_dim = query.shape[1], query.shape[3]
    if head_dim % 2:
        raise ValueError(f"`query` must have an even number of head channels, got {head_dim}")
    check_tensor("key", key, "(B, N, H, D)", like=query)
    check_shape("key", key, query.shape, "(B, N, H, D)")
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        check_tensor(name, weight, "(D)", like=query, any_dtype=True)
        check_shape(name, weight, (head_dim,), "(D)")
    for name, table in (("cosines", cosines), ("sines", sines)):
        check_tensor(name, table, "(N, D)", like=query, any_dtype=True)
        check_shape(name, table, (num_tokens, head_dim), "(N, D)")
    return why_not_triton(query), Memo()


_CALLS = Plans(_checked)


def rotary_rms_norm(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor,
    cosines: Tensor, sines: Tensor, *, eps: float = 1e-6, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``y = w x / sqrt(mean(x^2) + eps)`` over the channels of a head, then turned by its position.

    Token n turns each pair of channels, ``(y_2i, y_2i+1)``, to
    ``(y_2i cos_n,2i - y_2i+1 sin_n,2i, y_2i+1 cos_n,2i+1 + y_2i sin_n,2i+1)``: what FLUX does to
    queries and keys before attention. Zhang and Sennrich 2019 (arXiv:1910.07467), Eq. 4; Su et al.
    2021 (arXiv:2104.09864), Eq. 34.

    Args:
        query: ``(B, N, H, D)``, any floating dtype, D even; any strides.
        key: ``(B, N, H, D)``, likewise.
        query_weight: ``(D)``, any floating dtype.
        key_weight: ``(D)``, likewise.
        cosines: ``(N, D)``, any floating dtype, cosines of the angles of channels.
        sines: ``(N, D)``, likewise.
        eps: added to the mean of squares.
        impl: ``auto``, ``reference`` (PyTorch) or ``triton``. ``auto`` takes the Triton kernel on
            CUDA for float16, bfloat16 and float32, 16 to 256 channels a head in powers of two,
            where no gradient of cosines or sines is asked for; not while torch.compile traces,
            which fuses the reference with its neighbours, nor under `torch.func` or forward-mode
            derivatives. The kernels differentiate once.

    Returns:
        Query and key, ``(B, N, H, D)``, contiguous, in the dtype they had. All is float32 inside
        (float64 for float64 inputs), also under autocast, and rounded once.

    Raises:
        ValueError: shapes or devices disagree, odd D, an unknown `impl`.
        TypeError: dtypes that are not floating point, or differ between query and key.
        NotImplementedError: ``impl="triton"`` cannot run here.
    """
    tensors = (query, key, query_weight, key_weight, cosines, sines)
    reason, memo = _CALLS(tensors, eps, impl)
    if needs_gradient(cosines, sines):
        reason = "its kernels have no gradient of cosines and sines"
    reason = reason or reason_of_transforms()
    if impl == "triton" and reason is not None:
        raise NotImplementedError(f"`impl` must not be 'triton' for rotary_rms_norm: {reason}")
    kernel = takes_kernel(impl, query, reason)
    if kernel and (impl == "triton" or not torch.compiler.is_compiling()):
        return rotary_rms_norm_triton(*tensors, eps, memo)
    return rotary_rms_norm_reference(*tensors, eps)
