"""Adaptive layer normalisation and gated sums as PyTorch operators; triton comes when they run."""

from typing import Any

import torch
from torch import Tensor

from .._common.operators import first_derivative, needs_gradient, register
from .._common.plans import Memo


def _fwd_shapes(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _gated_fwd_shapes(
    x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_shapes(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_FWD = register(
    "ada_layer_norm_fwd",
    "(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
    f"{__package__}.triton_fwd:ada_layer_norm_fwd",
    _fwd_shapes,
)
_GATED_FWD = register(
    "gated_ada_layer_norm_fwd",
    "(Tensor x, Tensor update, Tensor gate, Tensor scale, Tensor shift, float eps)"
    " -> (Tensor, Tensor)",
    f"{__package__}.triton_fwd:gated_ada_layer_norm_fwd",
    _gated_fwd_shapes,
)
_ADD_FWD = register(
    "gated_add_fwd",
    "(Tensor x, Tensor update, Tensor gate) -> Tensor",
    f"{__package__}.triton_fwd:gated_add_fwd",
    _add_shapes,
)


def _sum_shapes(x: Tensor, kinds: int) -> Tensor:
    return x.new_empty((kinds, x.shape[0], x.shape[2]), dtype=torch.float32)


def _bwd_shapes(d_y: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _sum_shapes(x, 2)


def _gated_bwd_shapes(
    d_h: Tensor, d_y: Tensor, h: Tensor, update: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), update.new_empty(update.shape), _sum_shapes(h, 3)


def _add_bwd_shapes(d_h: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return update.new_empty(update.shape), _sum_shapes(update, 1)


_BWD = register(
    "ada_layer_norm_bwd",
    "(Tensor d_y, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor)",
    f"{__package__}.triton_bwd:ada_layer_norm_bwd",
    _bwd_shapes,
)
_GATED_BWD = register(
    "gated_ada_layer_norm_bwd",
    "(Tensor d_h, Tensor d_y, Tensor h, Tensor update, Tensor gate, Tensor scale, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    f"{__package__}.triton_bwd:gated_ada_layer_norm_bwd",
    _gated_bwd_shapes,
)
_ADD_BWD = register(
    "gated_add_bwd",
    "(Tensor d_h, Tensor update, Tensor gate) -> (Tensor, Tensor)",
    f"{__package__}.triton_bwd:gated_add_bwd",
    _add_bwd_shapes,
)


def _as_parameters(sums: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """The gradients of parameters, in their dtypes."""
    if len(set(dtypes)) == 1:  # as chunks of one linear map have: one call instead of one each
        sums = sums.to(dtypes[0])
    return [x.to(dtype) for x, dtype in zip(sums.unbind(), dtypes, strict=True)]


class _AdaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.eps, ctx.shift_dtype = eps, shift.dtype
        return _FWD(x, scale, shift, eps)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        d_x, sums = first_derivative("ada_layer_norm", _BWD, d_y, x, scale, ctx.eps)
        return d_x, *_as_parameters(sums, scale.dtype, ctx.shift_dtype), None


class _GatedAdaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        h, y = _GATED_FWD(x, update, gate, scale, shift, eps)
        ctx.save_for_backward(h, update, gate, scale)
        ctx.eps, ctx.shift_dtype = eps, shift.dtype
        return h, y

    @staticmethod
    def backward(ctx: Any, d_h: Tensor, d_y: Tensor) -> tuple[Tensor | None, ...]:
        h, update, gate, scale = ctx.saved_tensors
        arguments = (d_h, d_y, h, update, gate, scale, ctx.eps)
        d_x, d_update, sums = first_derivative("gated_ada_layer_norm", _GATED_BWD, *arguments)
        dtypes = (gate.dtype, scale.dtype, ctx.shift_dtype)
        return d_x, d_update, *_as_parameters(sums, *dtypes), None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(update, gate)
        return _ADD_FWD(x, update, gate)

    @staticmethod
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor | None, ...]:
        update, gate = ctx.saved_tensors
        d_update, sums = first_derivative("gated_add", _ADD_BWD, d_h, update, gate)
        return d_h, d_update, *_as_parameters(sums, gate.dtype)


def ada_layer_norm_triton(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, memo: Memo | None = None
) -> Tensor:
    """The operation of `api.ada_layer_norm` by the Triton kernels."""
    if needs_gradient(x, scale, shift):
        return _AdaLayerNorm.apply(x, scale, shift, float(eps))
    return _FWD(x, scale, shift, float(eps), memo=memo)


def gated_ada_layer_norm_triton(
    x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor,
    eps: float, memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of `api.gated_ada_layer_norm` by the Triton kernels."""
    if needs_gradient(x, update, gate, scale, shift):
        return _GatedAdaLayerNorm.apply(x, update, gate, scale, shift, float(eps))
    return _GATED_FWD(x, update, gate, scale, shift, float(eps), memo=memo)


def gated_add_triton(x: Tensor, update: Tensor, gate: Tensor, memo: Memo | None = None) -> Tensor:
    """The operation of `api.gated_add` by the Triton kernels."""
    if needs_gradient(x, update, gate):
        return _GatedAdd.apply(x, update, gate)
    return _ADD_FWD(x, update, gate, memo=memo)
