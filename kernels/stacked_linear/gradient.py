"""Stacked linear layers as one node of the graph of gradients.

Their forward reads weights where they lie. The backward, two products for each layer with few
samples in both, copies them side by side in the dtype of x, one launch for many of them, and lets
cuBLAS multiply all layers at once: kept from the forward on, that copy would be there when the
activations of all blocks are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._common.operators import first_derivative, needs_gradient
from .._common.precision import no_autocast
from .table import TensorTable
from .triton_fwd import stacked_linear_fwd


def _side_by_side(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``(G, *shape)`` of G tensors, rounded to `dtype`."""
    out = tensors[0].new_empty(len(tensors), *tensors[0].shape, dtype=dtype)
    torch._foreach_copy_(list(out.unbind()), list(tensors))
    return out


def _gradients(
    d_y: Tensor, x: Tensor, before_silu: Tensor | None, labels: Tensor | None, num_rows: int,
    dtype: torch.dtype, needs: tuple[bool, bool, bool, bool], *weights: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, and of all weights, biases and rows side by side, those that are needed."""
    d_x = d_weights = d_biases = d_rows = None
    with no_autocast(x.device.type):
        if before_silu is not None:
            d_y = torch.ops.aten.silu_backward(d_y, before_silu)
        if needs[3]:
            assert labels is not None
            # All tables as one, whose layers follow each other; a label that is none has no row.
            first = torch.arange(len(d_y), device=x.device)[:, None] * num_rows
            known = (labels >= 0) & (labels < num_rows)
            indices = torch.where(known, first + labels, -1).flatten()
            d_rows = torch.ops.aten.embedding_dense_backward(
                d_y.flatten(0, 1).to(dtype), indices, len(d_y) * num_rows, -1, False
            ).unflatten(0, (len(d_y), num_rows))
        d_y = d_y.to(x.dtype)
        if needs[0]:
            d_x = torch.bmm(d_y, _side_by_side(weights, x.dtype))
            d_x = d_x.sum(0) if x.ndim == 2 else d_x
        if needs[1]:
            each = x.expand(len(d_y), *x.shape) if x.ndim == 2 else x
            d_weights = torch.bmm(d_y.mT, each).to(dtype)
        if needs[2]:
            d_biases = d_y.sum(1, dtype=dtype)
    return d_x, d_weights, d_biases, d_rows


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, labels: Tensor | None, silu: bool, weights: TensorTable,
        biases: TensorTable, rows: TensorTable | None, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        out = stacked_linear_fwd(x, weights, biases, rows, labels, False)
        ctx.dtype, ctx.num_rows = weights.dtype, 0 if rows is None else rows.shape[0]
        ctx.save_for_backward(x, labels, out if silu else None, *weights.tensors)
        return torch.nn.functional.silu(out) if silu else out

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, before_silu, *weights = ctx.saved_tensors
        count = len(weights)
        wanted = ctx.needs_input_grad[6:]
        kinds = [wanted[i : i + count] for i in range(0, len(wanted), count)]
        needs = (ctx.needs_input_grad[0], *map(any, kinds), False)[:4]
        d_x, *gradients = first_derivative(
            "stacked_linear", _gradients, d_y, x, before_silu, labels, ctx.num_rows, ctx.dtype,
            needs, *weights,
        )  # fmt: skip
        given: list[Tensor | None] = []
        for gradient, kind in zip(gradients, kinds, strict=False):
            each = [None] * count if gradient is None else gradient.unbind()
            given += [y if need else None for y, need in zip(each, kind, strict=True)]
        return d_x, *[None] * 5, *given


def stacked_linear_triton(
    x: Tensor, weights: TensorTable, biases: TensorTable,
    rows: TensorTable | None, labels: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """The operation of `api.stacked_linear` on tensors that `api` has checked."""
    if torch.is_grad_enabled():
        tables = [weights, biases] if rows is None else [weights, biases, rows]
        tensors = [tensor for table in tables for tensor in table.tensors]
        if needs_gradient(x, *tensors):
            return _StackedLinear.apply(x, labels, silu, weights, biases, rows, *tensors)
    return stacked_linear_fwd(x, weights, biases, rows, labels, silu)
