"""Linear attention as PyTorch operators: schemas, shapes, gradients; triton comes when one runs."""

from typing import Any

import torch
from torch import Tensor

from .._common.operators import are_plain, first_derivative, needs_gradient, register
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
    matrix: Tensor | None = None, key_row: Tensor | None = None,
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
    f"(Tensor d_out, Tensor query, Tensor key, Tensor value, {_OPTIONS},"
    " Tensor? matrix=None, Tensor? key_row=None) -> (Tensor, Tensor, Tensor)",
    f"{__package__}.triton_bwd:linear_attention_bwd",
    _bwd_shapes,
)


def attend(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor | None, ...]:
    """The output, and what `attend_bwd` may start from where that is known."""
    if not torch.compiler.is_compiling() and are_plain(query, key, value):
        from .triton_fwd import linear_attention_fwd_keeping

        return linear_attention_fwd_keeping(query, key, value, *options)
    # A compiler has no results that are there or not.
    return (_FWD(query, key, value, *options),)


def attend_bwd(d_out: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `arguments` are those of `attend` and what that kept."""
    return first_derivative("linear_attention", _BWD, d_out, *arguments)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        ctx.options = options
        out, *kept = attend(query, key, value, *options)
        ctx.save_for_backward(query, key, value, *kept)
        return out  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grads = attend_bwd(d_out, query, key, value, *ctx.options, *kept)
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
