"""Linear attention as PyTorch operators: schemas, shapes, gradients; triton comes when one runs."""

from typing import Any

import torch
from torch import Tensor

from .._common.operators import first_derivative, needs_gradient, register
from .._common.plans import Memo

_OPTIONS = "str feature_map, str normalizer, float scale, float eps"


def _fwd_shapes(
    query: Tensor, key: Tensor, value: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> Tensor:  # fmt: skip
    return query.new_empty(*query.shape[:3], value.shape[3])


def _bwd_shapes(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_FWD = register(
    "linear_attention_fwd",
    f"(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> Tensor",
    f"{__package__}.triton_fwd:linear_attention_fwd",
    _fwd_shapes,
)
_BWD = register(
    "linear_attention_bwd",
    f"(Tensor d_out, Tensor query, Tensor key, Tensor value, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    f"{__package__}.triton_bwd:linear_attention_bwd",
    _bwd_shapes,
)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options = options
        return _FWD(query, key, value, *options)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        grads = first_derivative("linear_attention", _BWD, d_out, *inputs, *ctx.options)
        return (*grads, None, None, None, None)


def linear_attention_triton(
    query: Tensor, key: Tensor, value: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float, *, memo: Memo | None = None,
) -> Tensor:  # fmt: skip
    """The operation of `api.linear_attention` by the Triton kernels."""
    options = (feature_map, normalizer, scale, eps)
    if needs_gradient(query, key, value):
        return _LinearAttention.apply(query, key, value, *options)
    return _FWD(query, key, value, *options, memo=memo)
