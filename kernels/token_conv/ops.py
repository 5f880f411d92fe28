"""The token convolution as PyTorch operators; triton comes when one runs."""

from typing import Any

import torch
from torch import Tensor

from .._common.operators import first_derivative, needs_gradient, register
from .._common.plans import Memo


def _fwd_shapes(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    prefix: int, height: int, width: int,
) -> Tensor:  # fmt: skip
    return tokens.new_empty(tokens.shape)


def _bwd_tokens_shapes(
    d_out: Tensor, weight: Tensor, residual: Tensor | None, prefix: int, height: int, width: int
) -> Tensor:
    return d_out.new_empty(d_out.shape)


def _bwd_weight_shapes(
    d_out: Tensor, tokens: Tensor, filters: int, size: int, per_sample: bool,
    prefix: int, height: int, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lead = (tokens.shape[0],) if per_sample else ()
    return (
        tokens.new_empty((*lead, filters, size, size), dtype=torch.float32),
        tokens.new_empty((filters,), dtype=torch.float32),
    )


_GRID = "int prefix, SymInt height, SymInt width"
_FWD = register(
    "token_conv2d_fwd",
    f"(Tensor tokens, Tensor weight, Tensor? bias, Tensor? residual, {_GRID}) -> Tensor",
    f"{__package__}.triton_fwd:token_conv2d_fwd",
    _fwd_shapes,
)
_BWD_TOKENS = register(
    "token_conv2d_bwd_tokens",
    f"(Tensor d_out, Tensor weight, Tensor? residual, {_GRID}) -> Tensor",
    f"{__package__}.triton_fwd:token_conv2d_bwd_tokens",
    _bwd_tokens_shapes,
)
_BWD_WEIGHT = register(
    "token_conv2d_bwd_weight",
    f"(Tensor d_out, Tensor tokens, int filters, int size, bool per_sample, {_GRID})"
    " -> (Tensor, Tensor)",
    f"{__package__}.triton_bwd:token_conv2d_bwd_weight",
    _bwd_weight_shapes,
)


def convolve(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *grid: int
) -> Tensor:
    """The operation without a gradient; `grid` is prefix, height, width."""
    return _FWD(tokens, weight, bias, residual, *grid)


def convolve_bwd_tokens(
    d_out: Tensor, weight: Tensor, residual: Tensor | None, *grid: int
) -> Tensor:
    """The gradient of tokens, added to `residual`, another one of theirs."""
    return first_derivative("token_conv2d", _BWD_TOKENS, d_out, weight, residual, *grid)


def convolve_bwd_weight(
    d_out: Tensor, tokens: Tensor, weight: Tensor, bias_dtype: torch.dtype | None,
    needs_weight: bool, needs_bias: bool, *grid: int,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Those gradients of weight and bias that are needed, in their dtypes."""
    if not (needs_weight or needs_bias):
        return None, None
    sizes = (*weight.shape[-3:-1], weight.ndim == 4, *grid)
    d_weight, d_bias = first_derivative("token_conv2d", _BWD_WEIGHT, d_out, tokens, *sizes)
    return (
        d_weight.to(weight.dtype) if needs_weight else None,
        d_bias.to(bias_dtype) if needs_bias else None,
    )


class _TokenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
        *grid: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(tokens, weight)
        ctx.grid = grid
        ctx.bias_dtype = None if bias is None else bias.dtype
        return convolve(tokens, weight, bias, residual, *grid)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        needs_tokens, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        d_tokens = convolve_bwd_tokens(d_out, weight, None, *ctx.grid) if needs_tokens else None
        d_weight, d_bias = convolve_bwd_weight(
            d_out, tokens, weight, ctx.bias_dtype, needs_weight, needs_bias, *ctx.grid
        )
        return d_tokens, d_weight, d_bias, d_out if needs_residual else None, None, None, None


def token_conv2d_triton(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    prefix: int, height: int, width: int, *, memo: Memo | None = None,
) -> Tensor:  # fmt: skip
    """The operation of `api.token_conv2d` by the Triton kernels."""
    if needs_gradient(tokens, weight, bias, residual):
        return _TokenConv2d.apply(tokens, weight, bias, residual, prefix, height, width)
    return _FWD(tokens, weight, bias, residual, prefix, height, width, memo=memo)
