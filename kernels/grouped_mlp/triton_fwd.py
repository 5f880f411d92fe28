"""The grouped MLP: a program makes the hidden units of its group and sample anew, they are few."""

import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div, device_guard, empty, multiprocessors
from .._common.plans import Memo, Plans

# Outputs a program writes, as many as the tensor cores like; a wider block leaves more of it empty.
_OUTPUTS = 64
_WARPS = 4
# Samples a program takes: the least that a product takes, more where that is over this many waves,
# but hidden units at most that float32 holds in registers (from what ptxas says for Hopper).
_SAMPLES = (16, 32, 64)
_WAVES = 8
_UNITS = 2048


@triton.jit
def _weights(p_weight, row, rows, o_r, o_d, D: tl.constexpr, DTYPE: tl.constexpr):
    """Rows `row` + o_r of a weight (.., D) as columns, zeros beyond `rows` and D."""
    mask = (o_r < rows)[:, None] & (o_d < D)[None, :]
    offsets = (row + o_r)[:, None] * D + o_d[None, :]
    return tl.trans(tl.load(p_weight + offsets, mask=mask, other=0.0).to(DTYPE))


@triton.jit(do_not_specialize=["batch"])
def _grouped_mlp_fwd_kernel(
    p_x, p_weight1, p_bias1, p_weight2, p_bias2, p_o, batch, GROUPS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """o = gelu(x W1^T + b1) W2^T + b2 of BLOCK samples and BLOCK_K outputs of one group.

    Grid (blocks of samples, groups, blocks of outputs); a group has D channels, M hidden units, K
    outputs. Where a block is wider than that, weights and biases are zero, and so are the units.
    """
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    group = tl.program_id(1)
    o_b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    o_m = tl.arange(0, BLOCK_M)
    o_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_b = (o_b < batch)[:, None]
    row = o_b.to(tl.int64)[:, None]

    p_x += row * (GROUPS * D) + group * D + o_d[None, :]
    x = tl.load(p_x, mask=m_b & (o_d < D)[None, :], other=0.0)
    weight = _weights(p_weight1, group * M, M, o_m, o_d, D, DTYPE)
    bias = tl.load(p_bias1 + group * M + o_m, mask=o_m < M, other=0.0).to(tl.float32)
    hidden = tl.dot(x, weight, input_precision="ieee") + bias[None, :]
    hidden = 0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476))

    weight = _weights(p_weight2, group * K, K, o_k, o_m, M, DTYPE)
    bias = tl.load(p_bias2 + group * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    out = tl.dot(hidden.to(DTYPE), weight, input_precision="ieee") + bias[None, :]
    p_o += row * (GROUPS * K) + group * K + o_k[None, :]
    tl.store(p_o, out.to(p_o.dtype.element_ty), mask=m_b & (o_k < K)[None, :])


def _block(width: int) -> int:
    """The power of two that holds `width`, at least what a product takes."""
    return max(16, 1 << (width - 1).bit_length())


def _plan(tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], groups: int) -> KernelCall:
    x, weight1, _, weight2, _ = tensors
    batch = x.shape[0]
    channels, hidden, outputs = (n // groups for n in (x.shape[1], len(weight1), len(weight2)))
    block_m, block_k = _block(hidden), min(_OUTPUTS, _block(outputs))
    per_block = groups * ceil_div(outputs, block_k)
    most = _WAVES * multiprocessors(x)
    samples = [n for n in _SAMPLES if n * block_m <= _UNITS]
    block = next((n for n in samples if ceil_div(batch, n) * per_block <= most), samples[-1])
    constants = {
        "GROUPS": groups, "D": channels, "BLOCK_D": _block(channels),
        "M": hidden, "BLOCK_M": block_m, "K": outputs, "BLOCK_K": block_k,
        "BLOCK": block, "num_warps": _WARPS,
    }  # fmt: skip
    grid = (ceil_div(batch, block), groups, ceil_div(outputs, block_k))
    return KernelCall(_grouped_mlp_fwd_kernel, grid, (batch,), constants)


_PLANS = Plans(_plan)


def grouped_mlp_fwd(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    groups: int, *, memo: Memo | None = None,
) -> Tensor:  # fmt: skip
    """The operation of `api.grouped_mlp` on tensors that `api` has checked."""
    out = empty(x.shape[0], weight2.shape[0], like=x)
    if x.shape[0] == 0:
        return out
    call = _PLANS((x, weight1, bias1, weight2, bias2), groups, memo=memo)
    with device_guard(x):
        call(
            x.contiguous(), weight1.contiguous(), bias1.contiguous(),
            weight2.contiguous(), bias2.contiguous(), out,
        )  # fmt: skip
    return out
