"""Adaptive layer normalisation: a program takes some tokens of one sample and reads each once."""

import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import (
    ceil_div,
    common_vector,
    device_guard,
    empty,
    strides_in_vectors,
    unit_last,
)
from .._common.plans import Memo, Plans
from .configs import launch_of


@triton.jit(do_not_specialize=["tokens", "blocks", "gate_s", "scale_s", "shift_s", "eps"])
def _ada_layer_norm_fwd_kernel(
    p_x, p_update, p_gate, p_scale, p_shift, p_h, p_y,
    tokens, blocks, gate_s, scale_s, shift_s, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    VECTOR: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """y = (h - mean) / sqrt(var + eps) (1 + scale) + shift, h = x + gate update if GATED, else x.

    Grid (samples * blocks of ROWS tokens).
    """
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * ROWS
    o_r = tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    mask = (o_r < tokens - first)[:, None]
    if BLOCK_C > C:  # a mask of rows alone costs less
        mask = mask & m_c[None, :]
    start = (batch * tokens + first) * C
    o_x = o_r[:, None] * C + o_c[None, :]
    x = tl.load(p_x + start + o_x, mask=mask, other=0.0).to(tl.float32)
    # Strides are given in multiples of VECTOR, so that the compiler knows them aligned.
    if GATED:
        update = tl.load(p_update + start + o_x, mask=mask, other=0.0).to(tl.float32)
        p_gate += batch * gate_s * VECTOR
        gate = tl.load(p_gate + o_c, mask=m_c, other=0.0).to(tl.float32)
        h = (x + gate[None, :] * update).to(p_h.dtype.element_ty)
        tl.store(p_h + start + o_x, h, mask=mask)
        x = h.to(tl.float32)
    # On their way while sums are taken.
    scale = tl.load(p_scale + batch * scale_s * VECTOR + o_c, mask=m_c, other=0.0)
    shift = tl.load(p_shift + batch * shift_s * VECTOR + o_c, mask=m_c, other=0.0)
    x -= (tl.sum(x, 1) / C)[:, None]
    if BLOCK_C > C:
        x = tl.where(m_c[None, :], x, 0.0)
    variance = tl.sum(x * x, 1) / C
    y = x * (1.0 / tl.sqrt(variance + eps))[:, None] * (1.0 + scale.to(tl.float32))[None, :]
    y += shift.to(tl.float32)[None, :]
    tl.store(p_y + start + o_x, y.to(p_y.dtype.element_ty), mask=mask)


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], gated: bool, eps: float
) -> KernelCall:
    x, _, *parameters = tensors
    batch, tokens, channels = x.shape
    launch = launch_of(channels)
    rows = min(launch.rows, 1 << (tokens - 1).bit_length())
    blocks = ceil_div(tokens, rows)
    parameters = [unit_last(parameter) for parameter in parameters]
    vector = common_vector(*parameters)
    numbers = (tokens, blocks, *strides_in_vectors(vector, *parameters), eps)
    constants = {
        "C": channels, "BLOCK_C": 1 << (channels - 1).bit_length(), "ROWS": rows,
        "VECTOR": vector, "GATED": gated, "num_warps": launch.warps,
    }  # fmt: skip
    return KernelCall(_ada_layer_norm_fwd_kernel, (batch * blocks,), numbers, constants)


_PLANS = Plans(_plan)


def ada_layer_norm_fwd(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, *, memo: Memo | None = None
) -> Tensor:
    """The operation of `api.ada_layer_norm` on tensors that `api` has checked."""
    y = empty(*x.shape, like=x)
    if x.numel() == 0:
        return y
    call = _PLANS((x, x, scale, scale, shift), False, eps, memo=memo)
    x, scale, shift = x.contiguous(), unit_last(scale), unit_last(shift)
    with device_guard(x):
        call(x, x, scale, scale, shift, y, y)
    return y


def gated_ada_layer_norm_fwd(
    x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor,
    eps: float, *, memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of `api.gated_ada_layer_norm` on tensors that `api` has checked."""
    h, y = empty(*x.shape, like=x), empty(*x.shape, like=x)
    if x.numel() == 0:
        return h, y
    call = _PLANS((x, update, gate, scale, shift), True, eps, memo=memo)
    gate, scale, shift = unit_last(gate), unit_last(scale), unit_last(shift)
    with device_guard(x):
        call(x.contiguous(), update.contiguous(), gate, scale, shift, h, y)
    return h, y
