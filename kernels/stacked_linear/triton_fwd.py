"""Stacked linear layers: a program reads some rows of one layer's weight once, for all samples."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div, device_guard, empty
from .._common.plans import Plans
from .table import TensorTable

# Outputs of a program, the least that Hopper's matrix instructions take, and bytes of a row's step.
_OUTPUTS = 64
_STEP_BYTES = 256
# Samples of a program; with more of them weights are read again, from L2.
_MAX_SAMPLES = 64
_LAUNCH = {"num_warps": 4, "num_stages": 4}


@triton.jit
def _tensor(p_table, group, DTYPE: tl.constexpr):
    """The address of a table's tensor, on the boundary that `TensorTable.is_plain` has seen."""
    address = tl.load(p_table + group).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, 16)


@triton.jit(do_not_specialize=["batch"])
def _stacked_linear_fwd_kernel(
    p_x, p_labels, p_weights, p_biases, p_rows, p_o, batch,
    SHARED: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, F: tl.constexpr,
    ROWS: tl.constexpr, ONE_LABEL: tl.constexpr, SILU: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y_g = f(x_g W_g^T + b_g + T_g[labels]); ROWS of a table T_g, 0 without tables; ONE_LABEL of
    a sample for all layers. Tensors of the tables are float32 if WIDE, whatever x is.

    Grid (blocks of outputs, layers, blocks of samples). Outputs are the rows of the product, since
    there are many of them and few samples.
    """
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    TABLES: tl.constexpr = tl.float32 if WIDE else DTYPE
    OUT: tl.constexpr = p_o.dtype.element_ty
    group = tl.program_id(1)
    o_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    o_b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_f, m_b = o_f < F, o_b < batch
    first = group.to(tl.int64) * batch
    if not SHARED:
        p_x += first * K
    p_x += o_b[:, None] * K
    p_weight = _tensor(p_weights, group, TABLES) + o_f[:, None] * K

    y = tl.zeros((BLOCK_F, BLOCK_B), tl.float32)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)[None, :]
        if K % BLOCK_K == 0:
            weight = tl.load(p_weight + o_k, mask=m_f[:, None], other=0.0)
            x = tl.load(p_x + o_k, mask=m_b[:, None], other=0.0)
        else:
            weight = tl.load(p_weight + o_k, mask=m_f[:, None] & (o_k < K), other=0.0)
            x = tl.load(p_x + o_k, mask=m_b[:, None] & (o_k < K), other=0.0)
        y = tl.dot(weight.to(DTYPE), tl.trans(x), y, input_precision="ieee")
    bias = tl.load(_tensor(p_biases, group, TABLES) + o_f, mask=m_f, other=0.0).to(DTYPE)
    y = (y + bias.to(tl.float32)[:, None]).to(DTYPE)
    if ROWS > 0:
        if not ONE_LABEL:
            p_labels += first
        label = tl.load(p_labels + o_b, mask=m_b, other=0)
        known = (label >= 0) & (label < ROWS)
        p_row = _tensor(p_rows, group, TABLES) + label[None, :] * F + o_f[:, None]
        row = tl.load(p_row, mask=m_f[:, None] & known[None, :], other=float("nan"))
        y = (y.to(tl.float32) + row.to(tl.float32)).to(OUT)
    if SILU:
        wide = y.to(tl.float32)
        y = (wide / (1.0 + tl.exp(-wide))).to(OUT)
    p_o += (first + o_b)[None, :] * F + o_f[:, None]
    tl.store(p_o, y, mask=m_f[:, None] & m_b[None, :])


def _block(width: int, most: int) -> int:
    """The power of two that holds `width`, at most `most`, at least what a product takes."""
    return min(most, max(16, 1 << (width - 1).bit_length()))


def _plan(
    tensors: tuple[Tensor], weights: torch.dtype, count: int, outputs: int, num_rows: int,
    one_label: bool, silu: bool,
) -> KernelCall:  # fmt: skip
    (x,) = tensors
    batch, width = x.shape[-2:]
    block_b, block_k = _block(batch, _MAX_SAMPLES), _block(width, _STEP_BYTES // weights.itemsize)
    constants = {
        "SHARED": x.ndim == 2, "WIDE": weights != x.dtype, "K": width, "F": outputs,
        "ROWS": num_rows, "ONE_LABEL": one_label, "SILU": silu,
        "BLOCK_B": block_b, "BLOCK_F": _OUTPUTS, "BLOCK_K": block_k, **_LAUNCH,
    }  # fmt: skip
    grid = (ceil_div(outputs, _OUTPUTS), count, ceil_div(batch, block_b))
    return KernelCall(_stacked_linear_fwd_kernel, grid, (batch,), constants)


_PLANS = Plans(_plan)


def stacked_linear_fwd(
    x: Tensor, weights: TensorTable, biases: TensorTable,
    rows: TensorTable | None, labels: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """The operation of `api.stacked_linear` on tensors that `api` has checked."""
    outputs = weights.shape[0]
    dtype = x.dtype if rows is None else torch.promote_types(x.dtype, rows.dtype)
    out = empty(len(weights), x.shape[-2], outputs, like=x, dtype=dtype)
    if out.numel() == 0:
        return out
    x = x.contiguous()
    num_rows = 0 if rows is None else rows.shape[0]
    one_label = labels is None or labels.ndim == 1
    call = _PLANS((x,), weights.dtype, len(weights), outputs, num_rows, one_label, silu)
    addresses = weights.addresses()
    p_rows = addresses if rows is None else rows.addresses()
    with device_guard(x):
        call(
            x, addresses if labels is None else labels.contiguous(),
            addresses, biases.addresses(), p_rows, out,
        )  # fmt: skip
    return out
