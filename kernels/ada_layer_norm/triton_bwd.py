"""Gradients of adaptive layer normalisation and of gated sums: one pass over the tokens.

A program takes a run of tokens of one sample and leaves its sums over them, of which there are as
many as programs, so that gradients of scale, shift and gate have the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import (
    ceil_div,
    common_vector,
    device_guard,
    empty,
    multiprocessors,
    strides_in_vectors,
    unit_last,
)
from .._common.plans import Plans
from .configs import bwd_launch_of


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["tokens", "share", "splits", "gate_s", "scale_s", "eps"])
def _ada_layer_norm_bwd_kernel(
    p_dh, p_dy, p_h, p_update, p_gate, p_scale, p_dx, p_du, p_sums,
    tokens, share, splits, gate_s, scale_s, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With n = (h - mean) r, r = 1 / sqrt(var + eps) and w = dy (1 + scale) a token's gradient is

    dx = dh + r (w - mean(w) - n mean(w n)), and du = gate dx if GATED; without NORM dx = dh, and is
    not written. Sums over tokens: of dx update for the gate, of dy n for the scale, of dy for the
    shift, where there are such. Grid (samples, splits of `share` tokens).
    """
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * share
    last = tl.minimum(first + share, tokens)
    o_r = tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if GATED:
        p_gate += batch * gate_s * VECTOR
        gate = tl.load(p_gate + o_c, mask=m_c, other=0.0).to(tl.float32)
        sum_gate = tl.zeros((ROWS, BLOCK_C), tl.float32)
    if NORM:
        p_scale += batch * scale_s * VECTOR
        scale = 1.0 + tl.load(p_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
        sum_scale = tl.zeros((ROWS, BLOCK_C), tl.float32)
        sum_shift = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for token in tl.range(first, last, ROWS, num_stages=STAGES):
        mask = (o_r < last - token)[:, None]
        if BLOCK_C > C:
            mask = mask & m_c[None, :]
        place = (batch * tokens + token) * C + o_r[:, None] * C + o_c[None, :]
        if GATED:
            dx = tl.load(p_dh + place, mask=mask, other=0.0).to(tl.float32)
            update = tl.load(p_update + place, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            dy = tl.load(p_dy + place, mask=mask, other=0.0).to(tl.float32)
            n = tl.load(p_h + place, mask=mask, other=0.0).to(tl.float32)
            # Sums that need not wait for each other share the warps' exchange.
            w = dy * scale[None, :]
            sum_n, sum_w = tl.reduce((n, w), 1, _both)
            n -= (sum_n / C)[:, None]
            if BLOCK_C > C:
                n = tl.where(m_c[None, :], n, 0.0)
            sum_nn, sum_wn = tl.reduce((n * n, w * n), 1, _both)
            r = 1.0 / tl.sqrt(sum_nn / C + eps)
            # Infinite where there is no token, if eps is 0.
            r = tl.where(o_r < last - token, r, 0.0)
            n *= r[:, None]
            sum_scale += dy * n
            sum_shift += dy
            normed = r[:, None] * (w - (sum_w / C)[:, None] - n * (r * sum_wn / C)[:, None])
            if GATED:
                dx += normed
            else:
                dx = normed
            tl.store(p_dx + place, dx.to(p_dx.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(p_du + place, (gate[None, :] * dx).to(p_du.dtype.element_ty), mask=mask)
            sum_gate += dx * update
    # One kind of sum after the other, each (samples, splits, C).
    p_sums += (batch * splits + split) * C + o_c
    kind = tl.num_programs(0).to(tl.int64) * splits * C
    if GATED:
        tl.store(p_sums, tl.sum(sum_gate, 0), mask=m_c)
        p_sums += kind
    if NORM:
        tl.store(p_sums, tl.sum(sum_scale, 0), mask=m_c)
        tl.store(p_sums + kind, tl.sum(sum_shift, 0), mask=m_c)


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], norm: bool, gated: bool, eps: float
) -> tuple[int, KernelCall]:
    """The number of splits, and the launch."""
    x, gate, scale, _ = tensors
    batch, tokens, channels = x.shape
    launch = bwd_launch_of(channels, x.element_size(), norm=norm, gated=gated)
    rows = min(launch.rows, 1 << (tokens - 1).bit_length())
    blocks = ceil_div(tokens, rows)
    # No more than run at a time: a few that are left over would take as long as all the others.
    splits = min(blocks, max(launch.programs * multiprocessors(x) // batch, 1))
    share = ceil_div(blocks, splits) * rows
    splits = ceil_div(tokens, share)
    parameters = unit_last(gate), unit_last(scale)
    vector = common_vector(*parameters)
    numbers = (tokens, share, splits, *strides_in_vectors(vector, *parameters), eps)
    constants = {
        "C": channels, "BLOCK_C": 1 << (channels - 1).bit_length(), "ROWS": rows,
        "VECTOR": vector, "NORM": norm, "GATED": gated, "STAGES": launch.stages,
        "num_warps": launch.warps,
    }  # fmt: skip
    return splits, KernelCall(_ada_layer_norm_bwd_kernel, (batch, splits), numbers, constants)


_PLANS = Plans(_plan)


def _launched(splits: int, call: KernelCall, tensors: tuple[Tensor, ...], kinds: int) -> Tensor:
    """Runs `call` on all its tensors but the last, and adds up what that one then holds."""
    d_x = tensors[-1]
    batch, _, channels = d_x.shape
    sums = empty(kinds, batch, splits, channels, like=d_x, dtype=torch.float32)
    with device_guard(d_x):
        call(*tensors, sums)
    return sums.sum(2)


def _no_sums(x: Tensor, kinds: int) -> Tensor:
    return x.new_zeros(kinds, x.shape[0], x.shape[2], dtype=torch.float32)


def ada_layer_norm_bwd(d_y: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of scale and shift, ``(2, B, C)`` in float32."""
    d_x = empty(*x.shape, like=x)
    if x.numel() == 0:
        return d_x, _no_sums(x, 2)
    d_y, x, scale = d_y.contiguous(), x.contiguous(), unit_last(scale)
    launch = _PLANS((x, scale, scale, d_y), True, False, eps)
    return d_x, _launched(*launch, (d_y, d_y, x, x, scale, scale, d_x, d_x), 2)


def gated_ada_layer_norm_bwd(
    d_h: Tensor, d_y: Tensor, h: Tensor, update: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and update, and those of gate, scale and shift, ``(3, B, C)`` in float32."""
    d_x, d_update = empty(*h.shape, like=h), empty(*update.shape, like=update)
    if h.numel() == 0:
        return d_x, d_update, _no_sums(h, 3)
    d_h, d_y, h, update = (t.contiguous() for t in (d_h, d_y, h, update))
    gate, scale = unit_last(gate), unit_last(scale)
    launch = _PLANS((h, gate, scale, update), True, True, eps)
    sums = _launched(*launch, (d_h, d_y, h, update, gate, scale, d_x, d_update), 3)
    return d_x, d_update, sums


def gated_add_bwd(d_h: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of update, and that of gate, ``(1, B, C)`` in float32; that of x is `d_h`."""
    d_update = empty(*update.shape, like=update)
    if update.numel() == 0:
        return d_update, _no_sums(update, 1)
    d_h, update, gate = d_h.contiguous(), update.contiguous(), unit_last(gate)
    launch = _PLANS((update, gate, gate, d_h), False, True, 0.0)
    tensors = (d_h, d_h, update, update, gate, gate, d_update, d_update)
    return d_update, _launched(*launch, tensors, 1)
