"""Normalisation and rotation as PyTorch operators; triton comes when they run."""

from typing import Any

import torch
from torch import Tensor

from .._common.operators import first_derivative, needs_gradient, register
from .._common.plans import Memo


def _fwd_shapes(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor,
    cosines: Tensor, sines: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape)


_FWD = register(
    "rotary_rms_norm_fwd",
    "(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor cosines,"
    " Tensor sines, float eps) -> (Tensor, Tensor)",
    f"{__package__}.triton_fwd:rotary_rms_norm_fwd",
    _fwd_shapes,
)


def _bwd_shapes(
    d_query_out: Tensor, d_key_out: Tensor, query: Tensor, key: Tensor,
    query_weight: Tensor, key_weight: Tensor, cosines: Tensor, sines: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sums = query.new_empty((2, query.shape[3]), dtype=torch.float32)
    return query.new_empty(query.shape), key.new_empty(key.shape), sums


_BWD = register(
    "rotary_rms_norm_bwd",
    "(Tensor d_query_out, Tensor d_key_out, Tensor query, Tensor key, Tensor query_weight,"
    " Tensor key_weight, Tensor cosines, Tensor sines, float eps) -> (Tensor, Tensor, Tensor)",
    f"{__package__}.triton_bwd:rotary_rms_norm_bwd",
    _bwd_shapes,
)


class _RotaryRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.eps = arguments
        ctx.save_for_backward(*tensors)
        return _FWD(*arguments)

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        arguments = (*d_outs, *tensors, ctx.eps)
        d_query, d_key, sums = first_derivative("rotary_rms_norm", _BWD, *arguments)
        d_weights = (x.to(w.dtype) for x, w in zip(sums.unbind(), tensors[2:4], strict=True))
        return d_query, d_key, *d_weights, None, None, None


def rotary_rms_norm_triton(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor,
    cosines: Tensor, sines: Tensor, eps: float, memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of `api.rotary_rms_norm` by the Triton kernels."""
    tensors = (query, key, query_weight, key_weight, cosines, sines)
    if needs_gradient(*tensors):
        return _RotaryRmsNorm.apply(*tensors, float(eps))
    return _FWD(*tensors, float(eps), memo=memo)
