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
from .configs import launch_of, pieces_of


@triton.jit
def _mask(m_r, o_c, START: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """Of rows and columns; of rows alone where no column lies outside, which costs less."""
    mask = m_r[:, None]
    if START + BLOCK > C:
        mask = mask & (o_c < C)[None, :]
    return mask


@triton.jit
def _sums(
    p_x, p_update, p_gate, p_h, o_r, m_r,
    START: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Columns from START on of h, which is written if GATED, else of x; zeros outside."""
    o_c = START + tl.arange(0, BLOCK)
    mask = _mask(m_r, o_c, START, BLOCK, C)
    o_x = o_r[:, None] * C + o_c[None, :]
    x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        update = tl.load(p_update + o_x, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(p_gate + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        h = (x + gate[None, :] * update).to(p_h.dtype.element_ty)
        tl.store(p_h + o_x, h, mask=mask)
        x = h.to(tl.float32)
    return x


@triton.jit
def _deviations(x, mean, START: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """x - mean; zeros outside."""
    deviation = x - mean[:, None]
    if START + BLOCK > C:
        deviation = tl.where((START + tl.arange(0, BLOCK) < C)[None, :], deviation, 0.0)
    return deviation


@triton.jit
def _parameters(p_scale, p_shift, START: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    o_c = START + tl.arange(0, BLOCK)
    scale = tl.load(p_scale + o_c, mask=o_c < C, other=0.0)
    return scale, tl.load(p_shift + o_c, mask=o_c < C, other=0.0)


@triton.jit
def _store(
    p_y, deviation, factor, scale, shift, o_r, m_r,
    START: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    o_c = START + tl.arange(0, BLOCK)
    y = deviation * factor[:, None] * (1.0 + scale.to(tl.float32))[None, :]
    y += shift.to(tl.float32)[None, :]
    o_y = o_r[:, None] * C + o_c[None, :]
    tl.store(p_y + o_y, y.to(p_y.dtype.element_ty), mask=_mask(m_r, o_c, START, BLOCK, C))


@triton.jit(do_not_specialize=["tokens", "blocks", "gate_s", "scale_s", "shift_s", "eps"])
def _ada_layer_norm_fwd_kernel(
    p_x, p_update, p_gate, p_scale, p_shift, p_h, p_y,
    tokens, blocks, gate_s, scale_s, shift_s, eps,
    C: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
    VECTOR: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """y = (h - mean) / sqrt(var + eps) (1 + scale) + shift, h = x + gate update if GATED, else x.

    Grid (samples * blocks of ROWS tokens). The FIRST and the REST columns of a row are two tensors:
    one of the next power of two would have up to half of its threads idle.
    """
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * ROWS
    o_r = tl.arange(0, ROWS)
    m_r = o_r < tokens - first
    start = (batch * tokens + first) * C
    p_x += start
    p_update += start
    p_h += start
    p_y += start
    # Strides are given in multiples of VECTOR, so that the compiler knows them aligned.
    p_gate += batch * gate_s * VECTOR
    p_scale += batch * scale_s * VECTOR
    p_shift += batch * shift_s * VECTOR

    x = _sums(p_x, p_update, p_gate, p_h, o_r, m_r, 0, FIRST, C, GATED)
    total = tl.sum(x, 1)
    if REST > 0:
        more = _sums(p_x, p_update, p_gate, p_h, o_r, m_r, FIRST, REST, C, GATED)
        total += tl.sum(more, 1)
    # On their way while sums are taken.
    scale, shift = _parameters(p_scale, p_shift, 0, FIRST, C)
    if REST > 0:
        more_scale, more_shift = _parameters(p_scale, p_shift, FIRST, REST, C)
    mean = total / C
    x = _deviations(x, mean, 0, FIRST, C)
    total = tl.sum(x * x, 1)
    if REST > 0:
        more = _deviations(more, mean, FIRST, REST, C)
        total += tl.sum(more * more, 1)
    factor = 1.0 / tl.sqrt(total / C + eps)
    _store(p_y, x, factor, scale, shift, o_r, m_r, 0, FIRST, C)
    if REST > 0:
        _store(p_y, more, factor, more_scale, more_shift, o_r, m_r, FIRST, REST, C)


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
    first, rest = pieces_of(channels, launch.pieces)
    constants = {
        "C": channels, "FIRST": first, "REST": rest, "ROWS": rows, "VECTOR": vector,
        "GATED": gated, "num_warps": launch.warps,
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
