"""Adaptive layer normalisation: a program takes some tokens of one sample and reads each once.

Also a gated sum alone, whose programs need not hold whole tokens.
"""

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import (
    ceil_div,
    common_vector,
    device_guard,
    empty,
    is_too_old,
    strides_in_vectors,
    unit_last,
)
from .._common.plans import Memo, Plans
from .configs import launch_of, sum_launch
from .reference import ada_layer_norm_reference, gated_ada_layer_norm_reference


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
) -> KernelCall | None:
    """None where a graph has the operator, but the device no kernel: a tracer cannot ask for it."""
    x, _, *parameters = tensors
    if is_too_old(x):
        return None
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
    if call is None:
        return ada_layer_norm_reference(x, scale, shift, eps)
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
    if call is None:
        return gated_ada_layer_norm_reference(x, update, gate, scale, shift, eps)
    gate, scale, shift = unit_last(gate), unit_last(scale), unit_last(shift)
    with device_guard(x):
        call(x.contiguous(), update.contiguous(), gate, scale, shift, h, y)
    return h, y


@triton.jit(do_not_specialize=["tokens", "blocks", "gate_s"])
def _gated_add_fwd_kernel(
    p_x, p_update, p_gate, p_h, tokens, blocks, gate_s,
    C: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """h = x + gate update. Grid (samples * blocks of BLOCK elements, whichever tokens they are)."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    # A product with C, a constant: the compiler sees how far it is aligned.
    size = tokens.to(tl.int64) * C
    o_e = tl.arange(0, BLOCK)
    mask = o_e < size - first
    start = batch * size + first
    # It does not see that channels follow each other, RUN of them at least, which divides C.
    o_c = ((first % C).to(tl.int32) + o_e) % C
    o_c = tl.max_contiguous(tl.multiple_of(o_c, RUN), RUN)
    x = tl.load(p_x + start + o_e, mask=mask, other=0.0)
    update = tl.load(p_update + start + o_e, mask=mask, other=0.0)
    gate = tl.load(p_gate + batch * gate_s * VECTOR + o_c)
    h = x.to(tl.float32) + gate.to(tl.float32) * update.to(tl.float32)
    tl.store(p_h + start + o_e, h.to(p_h.dtype.element_ty), mask=mask)


def _add_plan(tensors: tuple[Tensor, Tensor, Tensor]) -> KernelCall:
    x, _, gate = tensors
    batch, tokens, channels = x.shape
    launch = sum_launch()
    blocks = ceil_div(tokens * channels, launch.elements)
    gate = unit_last(gate)
    vector = common_vector(gate)
    numbers = (tokens, blocks, *strides_in_vectors(vector, gate))
    constants = {
        "C": channels, "BLOCK": launch.elements, "RUN": gcd(16, channels, launch.elements),
        "VECTOR": vector, "num_warps": launch.warps,
    }  # fmt: skip
    return KernelCall(_gated_add_fwd_kernel, (batch * blocks,), numbers, constants)


_ADD_PLANS = Plans(_add_plan)


def gated_add_fwd(x: Tensor, update: Tensor, gate: Tensor, *, memo: Memo | None = None) -> Tensor:
    """The operation of `api.gated_add` on tensors that `api` has checked."""
    h = empty(*x.shape, like=x)
    if x.numel() == 0:
        return h
    call = _ADD_PLANS((x, update, gate), memo=memo)
    x, update, gate = x.contiguous(), update.contiguous(), unit_last(gate)
    with device_guard(x):
        call(x, update, gate, h)
    return h
