"""Signature, checks and choice of implementation of stacked linear layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._common.checks import IMPLEMENTATIONS, check_choice, check_tensor
from .._common.launch import takes_kernel, why_no_kernel
from .._common.operators import are_plain
from .reference import stacked_linear_reference
from .table import TensorTable


def _check_table(
    name: str, table: TensorTable, weights: TensorTable, shape: tuple[int, ...]
) -> None:
    if len(table) != len(weights) or tuple(table.shape) != shape:
        raise ValueError(
            f"`{name}` must be {len(weights)} of shape {shape},"
            f" got {len(table)} of {tuple(table.shape)}"
        )
    if table.dtype != weights.dtype:
        raise TypeError(f"`{name}` must have dtype {weights.dtype}, got {table.dtype}")
    if table.device != weights.device:
        raise ValueError(f"`{name}` must be on {weights.device}, got {table.device}")


def _check_each(x: tuple[Tensor, ...], count: int) -> None:
    """That these are one for each layer, alike."""
    if len(x) != count or any(
        (y.shape, y.dtype, y.device) != (x[0].shape, x[0].dtype, x[0].device) for y in x
    ):
        raise ValueError(
            f"`x` must be {count} tensors of one shape, dtype and device, got"
            f" {', '.join(f'{tuple(y.shape)} {y.dtype}' for y in x)}"
        )


def _check(
    x: Tensor | tuple[Tensor, ...], weights: TensorTable, biases: TensorTable,
    rows: TensorTable | None, labels: Tensor | None, dtype: torch.dtype | None, impl: str,
) -> None:  # fmt: skip
    """Raises what the arguments deserve."""
    check_choice("impl", impl, IMPLEMENTATIONS)
    if len(weights.shape) != 2:
        raise ValueError(f"`weights` must have shape (F, K), got {tuple(weights.shape)}")
    count, (outputs, width) = len(weights), weights.shape
    shape = "(B, K)"
    if isinstance(x, tuple):
        _check_each(x, count)
        x = x[0]
    elif x.ndim == 3:
        shape = "(G, B, K)"
    check_tensor("x", x, shape)
    product = x.dtype if dtype is None else dtype
    rounded = weights.dtype == torch.float32 and product in (torch.float16, torch.bfloat16)
    if product != weights.dtype and not rounded:
        subject = "`x` must have dtype" if dtype is None else "`dtype` must be"
        raise TypeError(f"{subject} {weights.dtype}, or half of float32, got {product}")
    if x.device != weights.device:
        raise ValueError(f"`x` must be on {weights.device}, got {x.device}")
    if x.shape[-1] != width or (x.ndim == 3 and len(x) != count):
        raise ValueError(
            f"`x` must have shape (B, {width}) or ({count}, B, {width}), got {tuple(x.shape)}"
        )
    _check_table("biases", biases, weights, (outputs,))
    if (rows is None) != (labels is None):
        raise ValueError("`rows` and `labels` must be given together")
    if rows is None or labels is None:
        return
    _check_table("rows", rows, weights, (rows.shape[0], outputs))
    batch = x.shape[-2]
    if labels.shape not in ((batch,), (count, batch)) or labels.dtype != torch.int64:
        raise ValueError(
            f"`labels` must be {batch} of int64, or {count} times as many,"
            f" got {tuple(labels.shape)} of {labels.dtype}"
        )
    if labels.device != x.device:
        raise ValueError(f"`labels` must be on {x.device}, got {labels.device}")


def stacked_linear(
    x: Tensor | Sequence[Tensor],
    weights: TensorTable,
    biases: TensorTable,
    *,
    rows: TensorTable | None = None,
    labels: Tensor | None = None,
    silu: bool = False,
    dtype: torch.dtype | None = None,
    separate: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """``y_g = f(x_g W_g^T + b_g + T_g[labels])``, f is silu or nothing, for G linear layers.

    The layers have one shape each of weights, biases and rows, but lie anywhere: those of the
    blocks of a transformer, say. A DiT makes so the scales, shifts and gates of its blocks from the
    time and the class (Peebles and Xie 2023, arXiv:2212.09748, adaLN-Zero); three launches do it
    for all of them instead of eight a block.

    Args:
        x: ``(G, B, K)``, or ``(B, K)`` for all layers the same, or G of ``(B, K)``; any floating
            dtype.
        weights: G of ``(F, K)``, in the dtype of the products; or float32 for products of half
            precision, to which they are then rounded, as autocast would.
        biases: G of ``(F)``, likewise.
        rows: G tables ``(R, F)`` in the dtype of the weights, of which `labels` picks a row for
            each sample, or None.
        labels: ``(B)``, int64, 0 to R - 1, or ``(G, B)``.
        silu: whether f is silu.
        dtype: of the products, to which x is rounded; None for that of x.
        separate: whether results come one by one. Then a layer whose result has no part in the loss
            has no gradients, instead of zeros.
        impl: ``auto``, ``reference`` (PyTorch) or ``triton``. ``auto`` takes the Triton kernel on
            CUDA for float16, bfloat16 and float32 where nothing traces and all tensors are
            contiguous and begin at multiples of 16 bytes.

    Returns:
        ``(G, B, F)`` in the dtype of the products, of rows where these are wider; G of ``(B, F)``
        if `separate`. Sums of products are float32 (float64 for float64 inputs), also under
        autocast, and rounded before rows are added and before silu, as modules would. The kernel's
        gradients for a table are views of one tensor, which has those of trained layers only. With
        a label that is none, the kernel makes a row of NaN; PyTorch raises.

    Raises:
        ValueError: shapes, counts or devices disagree, rows without labels, tensors that have moved
            since their table was made, an unknown `impl`.
        TypeError: dtypes that are not floating point, or disagree.
        NotImplementedError: ``impl="triton"`` cannot run here; a second derivative.
    """
    x = x if isinstance(x, Tensor) else tuple(x)
    _check(x, weights, biases, rows, labels, dtype, impl)
    tables = [weights, biases] if rows is None else [weights, biases, rows]
    each = x if isinstance(x, tuple) else (x,)
    inputs = each if labels is None else (*each, labels)
    product = each[0].dtype if dtype is None else dtype
    reason = why_no_kernel(weights.tensors[0])
    if not torch.compiler.is_compiling() and any(table.has_moved() for table in tables):
        raise ValueError("`weights`, `biases` and `rows` must be made anew once tensors have moved")
    if reason is None and not all(table.is_plain for table in tables):
        reason = "its kernel needs contiguous tensors that begin at multiples of 16 bytes"
    traced = torch.compiler.is_compiling() or (each[0].numel() and not are_plain(*inputs))
    if reason is None and traced:
        reason = "its kernel takes addresses, which a tracer does not have"
    if impl == "triton" and reason is not None:
        raise NotImplementedError(f"`impl` must not be 'triton' for stacked_linear: {reason}")
    out: Tensor | tuple[Tensor, ...]
    if takes_kernel(impl, each[0], reason):
        from .gradient import stacked_linear_triton

        out = stacked_linear_triton(x, weights, biases, rows, labels, silu, product)
    else:
        row_tables = None if rows is None else rows.tensors
        out = stacked_linear_reference(
            x, weights.tensors, biases.tensors, row_tables, labels, silu, product
        )
    if separate:
        return out if isinstance(out, tuple) else out.unbind()
    return torch.stack(out) if isinstance(out, tuple) else out
