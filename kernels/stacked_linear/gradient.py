"""Stacked linear layers as one node of the graph of gradients.

Their forward reads weights where they lie. The backward, two products for each layer with few
samples in both, copies them side by side in the dtype of the products, one launch for many of them,
and lets cuBLAS multiply all layers at once: kept from the forward on, that copy would be there when
the activations of all blocks are.

A layer whose result has no part in the loss, or whose tensors are frozen, is left out: its
gradients are None, as those of a module that nobody called.
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
    d_y: Tensor, x: Tensor | None, before_silu: Tensor | None, labels: Tensor | None,
    num_rows: int, product: torch.dtype, dtype: torch.dtype, needs: Sequence[bool],
    *weights: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients ``(G, ...)`` of x, weights, biases and rows, those that are needed: in `dtype`,
    that of x in the dtype of the products."""
    d_x = d_weights = d_biases = d_rows = None
    of_x, of_weights, of_biases, *of_rows = needs
    with no_autocast(d_y.device.type):
        if before_silu is not None:
            d_y = torch.ops.aten.silu_backward(d_y, before_silu)
        if any(of_rows):
            assert labels is not None
            # All tables as one, whose layers follow each other; a label that is none has no row.
            first = torch.arange(len(d_y), device=d_y.device)[:, None] * num_rows
            known = (labels >= 0) & (labels < num_rows)
            indices = torch.where(known, first + labels, -1).flatten()
            d_rows = torch.ops.aten.embedding_dense_backward(
                d_y.flatten(0, 1).to(dtype), indices, len(d_y) * num_rows, -1, False
            ).unflatten(0, (len(d_y), num_rows))
        d_y = d_y.to(product)
        if of_x:
            d_x = torch.bmm(d_y, _side_by_side(weights, product))
        if of_weights:
            assert x is not None
            each = x.expand(len(d_y), *x.shape) if x.ndim == 2 else x
            d_weights = torch.bmm(d_y.mT, each).to(dtype)
        if of_biases:
            d_biases = d_y.sum(1, dtype=dtype)
    return d_x, d_weights, d_biases, d_rows


def _spread(gradient: Tensor | None, layers: Sequence[int], wanted: Sequence[bool]) -> list[Any]:
    """For each of all layers its own of `gradient`, which is that of `layers`, where wanted."""
    out: list[Tensor | None] = [None] * len(wanted)
    if gradient is not None:
        for layer, part in zip(layers, gradient.unbind(), strict=True):
            out[layer] = part if wanted[layer] else None
    return out


class _StackedLinear(torch.autograd.Function):
    """Takes one x for all layers or one for each, and then the tensors of the tables."""

    @staticmethod
    def forward(
        ctx: Any, labels: Tensor | None, silu: bool, product: torch.dtype,
        weights: TensorTable, biases: TensorTable, rows: TensorTable | None, *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        count, num_tables = len(weights), 2 if rows is None else 3
        inputs = tensors[: len(tensors) - num_tables * count]
        x = (inputs[0] if len(inputs) == 1 else torch.stack(inputs)).to(product)
        out = stacked_linear_fwd(x, weights, biases, rows, labels, False)
        ctx.dtypes = product, weights.dtype, inputs[0].dtype
        ctx.num_rows = 0 if rows is None else rows.shape[0]
        needs = ctx.needs_input_grad[6:]
        ctx.needs = [needs[: len(inputs)]]
        ctx.needs += [needs[i : i + count] for i in range(len(inputs), len(needs), count)]
        # As in modules, what no gradient needs may change until then.
        of_x, of_weights, *_ = map(any, ctx.needs)
        kept = weights.tensors if of_x else ()
        ctx.save_for_backward(x if of_weights else None, labels, out if silu else None, *kept)
        return (torch.nn.functional.silu(out) if silu else out).unbind()

    @staticmethod
    def backward(ctx: Any, *d_ys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, labels, before_silu, *weights = ctx.saved_tensors
        of_x, *of_tables = ctx.needs
        count, is_shared = len(d_ys), len(of_x) == 1
        product, dtype, x_dtype = ctx.dtypes
        kinds = [of_x * count if is_shared else of_x, *of_tables]
        layers = [
            layer
            for layer, d_y in enumerate(d_ys)
            if d_y is not None and any(kind[layer] for kind in kinds)
        ]
        if not layers:
            return (None,) * len(ctx.needs_input_grad)
        if len(layers) < count:
            before_silu = None if before_silu is None else before_silu[layers]
            x = x[layers] if x is not None and x.ndim == 3 else x
            labels = labels[layers] if labels is not None and labels.ndim == 2 else labels
            weights = [weights[layer] for layer in layers] if weights else []
        needs = [any(kind[layer] for layer in layers) for kind in kinds]
        d_y = torch.stack([d_ys[layer] for layer in layers])  # type: ignore[misc]
        if torch.is_grad_enabled() and not d_y.requires_grad:
            d_y.requires_grad_()  # so that results say that they have no derivative, whatever of
        d_x, *gradients = first_derivative(
            "stacked_linear", _gradients, d_y, x, before_silu, labels, ctx.num_rows, product, dtype,
            needs, *weights,
        )  # fmt: skip
        d_x = None if d_x is None else d_x.to(x_dtype)
        given = [None if d_x is None else d_x.sum(0)] if is_shared else _spread(d_x, layers, of_x)
        for gradient, wanted in zip(gradients, of_tables, strict=False):
            given += _spread(gradient, layers, wanted)
        return *[None] * 6, *given


def stacked_linear_triton(
    x: Tensor | tuple[Tensor, ...], weights: TensorTable, biases: TensorTable,
    rows: TensorTable | None, labels: Tensor | None, silu: bool, product: torch.dtype,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """The operation of `api.stacked_linear` on tensors that `api` has checked; a tuple of results
    where these have gradients."""
    if torch.is_grad_enabled():
        tables = [weights, biases] if rows is None else [weights, biases, rows]
        tensors = [tensor for table in tables for tensor in table.tensors]
        inputs = x if isinstance(x, tuple) else (x,) if x.ndim == 2 else x.unbind()
        if needs_gradient(*inputs, *tensors):
            options = (labels, silu, product, weights, biases, rows)
            return _StackedLinear.apply(*options, *inputs, *tensors)
    x = torch.stack(x) if isinstance(x, tuple) else x
    return stacked_linear_fwd(x.to(product), weights, biases, rows, labels, silu)
