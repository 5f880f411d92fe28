"""Gradient of the queries of linear attention, for Hopper and heads too wide for `triton_bwd.py`.

ratio: dq_i = phi'(q_i) w_i (t_i + c_i z) with t_i = S do_i, w_i = s / (s phi(q_i) . z + eps) and
    c_i = -w_i phi(q_i) . t_i; and what the sums over queries are made of: x_i = w_i phi(q_i), whose
    state with do is dS, and dz = sum_i c_i x_i
none: dq_i = phi'(q_i) s t_i

A program keeps a whole state in shared memory, since c_i needs all of t_i, and passes a range of
queries by it. The copy engine (TMA) brings a tile of do; once it is multiplied, the queries take
its place, which x and dq then leave by the same way.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .._common.kernel_call import KernelCall
from .._common.launch import common_vector, empty, strides_in_vectors
from .._common.plans import Memo, Plans
from . import configs
from .hopper_blocks import (
    allocate,
    boxes_of,
    boxes_of_state,
    feature_grad,
    load,
    load_state,
    phi,
    rows_times,
    store,
    thread_barrier,
    tile_layout,
    wait_for,
)


@gluon.jit
def _row(p, first, D: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    o_d = first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    return gl.load(p + o_d, mask=o_d < D, other=0.0)


@gluon.jit
def _queries(
    p_q, stride, token, stop, first, D: gl.constexpr, BLOCK: gl.constexpr, WIDTH: gl.constexpr
):
    """A tile in registers, sixteen bytes a load."""
    LAYOUT: gl.constexpr = tile_layout(WIDTH, 8)
    o_m = token + gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))
    o_d = first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    mask = (o_m < stop)[:, None] & (o_d < D)[None, :]
    return gl.load(p_q + o_m.to(gl.int64)[:, None] * stride + o_d[None, :], mask=mask, other=0.0)


@gluon.jit
def _fold(x, BLOCK: gl.constexpr, WIDTH: gl.constexpr):
    """Sums the rows that a thread holds."""
    return gl.sum(gl.reshape(x, [BLOCK // 16, 2, 8, WIDTH]), 1)


@gluon.jit
def _store_sums(p, first, sums, D: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    total = gl.convert_layout(gl.sum(gl.sum(sums, 1), 0), gl.SliceLayout(0, LAYOUT))
    o_d = first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    gl.store(p + o_d, total, mask=o_d < D)


@gluon.jit(
    do_not_specialize=[
        "num_queries", "tokens_per_program", "rows", "heads", "scale", "eps", "q_sb",
    ]
)  # fmt: skip
def _linear_attention_bwd_dq_hopper_kernel(
    do0_d, do1_d, m00_d, m01_d, m10_d, m11_d, dq0_d, dq1_d, x0_d, x1_d, p_q, p_row, p_dz,
    num_queries, tokens_per_program, rows, heads, scale, eps, q_sb, q_sn, q_sh,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    FEATURE: gl.constexpr, RATIO: gl.constexpr, VECTOR: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Grid (ranges * B * H), each of which leaves a part of dz; m00 to m11 are boxes of (part of E,
    part of D), whose parts are alike."""
    L0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D0 // 2, 16])
    L1: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D1 // 2, 16]) if D1 > 0 else None
    )
    tile0, tile1, full = allocate(do0_d.dtype, 1, BLOCK, D0, D1)
    m00_s, m10_s, m_full = allocate(do0_d.dtype, 1, D0, D0, D1)
    m01_s, m11_s = m00_s, m10_s
    if D1 > 0:
        m01_s, m11_s, _ = allocate(do0_d.dtype, 1, D1, D0, D1)
    thread_barrier()
    tile0, tile1, full, m_full = tile0.index(0), tile1.index(0), full.index(0), m_full.index(0)
    m00_s, m01_s, m10_s, m11_s = m00_s.index(0), m01_s.index(0), m10_s.index(0), m11_s.index(0)

    row = gl.program_id(0) % rows
    batch, head = row // heads, row % heads
    start = gl.program_id(0) // rows * tokens_per_program
    stop = gl.minimum(start + tokens_per_program, num_queries)
    load_state(
        m00_d, m01_d, m10_d, m11_d, m00_s, m01_s, m10_s, m11_s, m_full, row, 0,
        D0, D1, D0, D1, False,
    )  # fmt: skip
    load(do0_d, do1_d, tile0, tile1, full, batch, head, start, 0, True, D0, D1)
    p_q += (batch.to(gl.int64) * q_sb + head * q_sh) * VECTOR
    p_row += row.to(gl.int64) * D
    none0, none1 = gl.zeros([BLOCK, D0], gl.float32, L0), 0.0
    dz0, dz1 = 0.0, 0.0
    if D1 > 0:
        none1 = gl.zeros([BLOCK, D1], gl.float32, L1)
    if RATIO:
        dz0 = _fold(none0, BLOCK, D0)
        if D1 > 0:
            dz1 = _fold(none1, BLOCK, D1)
    mbarrier.wait(m_full, 0)
    phase = 0
    for token in range(start, stop, BLOCK):
        t1 = none1
        q0, q1 = _queries(p_q, q_sn * VECTOR, token, stop, 0, D, BLOCK, D0), 0.0
        if D1 > 0:
            q1 = _queries(p_q, q_sn * VECTOR, token, stop, D0, D, BLOCK, D1)
        mbarrier.wait(full, phase)
        phase ^= 1
        t0 = rows_times(tile0, tile1, m00_s, m01_s, none0, D1, False)
        if D1 > 0:
            t1 = rows_times(tile0, tile1, m10_s, m11_s, none1, D1, False)
        t0, t1 = wait_for(t0, t1, D1 > 0)
        thread_barrier()
        tile0.store(q0)
        if D1 > 0:
            tile1.store(q1)
        thread_barrier()
        if RATIO:
            # Anew for every tile: registers would not hold it beside all sums.
            z0 = _row(p_row, 0, D, D0, L0)
            f0 = phi(tile0.load(L0), FEATURE)
            total = gl.sum(f0 * z0[None, :], 1)
            through = gl.sum(f0 * t0, 1)
            if D1 > 0:
                z1 = _row(p_row, D0, D, D1, L1)
                f1 = phi(tile1.load(L1), FEATURE)
                total += gl.convert_layout(gl.sum(f1 * z1[None, :], 1), gl.SliceLayout(1, L0))
                through += gl.convert_layout(gl.sum(f1 * t1, 1), gl.SliceLayout(1, L0))
            w = scale / (scale * total + eps)
            c = -w * through
            t0 = (t0 + c[:, None] * z0[None, :]) * w[:, None]
            t0 = feature_grad(tile0.load(L0), t0, FEATURE)
            x0 = (phi(tile0.load(L0), FEATURE) * w[:, None]).to(x0_d.dtype)
            dz0 += _fold(x0.to(gl.float32) * c[:, None], BLOCK, D0)
            store(x0_d, [batch, head, token, 0], tile0, x0)
            if D1 > 0:
                w = gl.convert_layout(w, gl.SliceLayout(1, L1))
                c = gl.convert_layout(c, gl.SliceLayout(1, L1))
                t1 = (t1 + c[:, None] * z1[None, :]) * w[:, None]
                t1 = feature_grad(tile1.load(L1), t1, FEATURE)
                x1 = (phi(tile1.load(L1), FEATURE) * w[:, None]).to(x0_d.dtype)
                dz1 += _fold(x1.to(gl.float32) * c[:, None], BLOCK, D1)
                store(x1_d, [batch, head, token, D0], tile1, x1)
            tma.store_wait(0)
            thread_barrier()
        else:
            t0 = feature_grad(tile0.load(L0), t0 * scale, FEATURE)
            if D1 > 0:
                t1 = feature_grad(tile1.load(L1), t1 * scale, FEATURE)
        store(dq0_d, [batch, head, token, 0], tile0, t0)
        if D1 > 0:
            store(dq1_d, [batch, head, token, D0], tile1, t1)
        tma.store_wait(0)
        thread_barrier()
        if token + BLOCK < stop:
            load(
                do0_d, do1_d, tile0, tile1, full, batch, head, token + BLOCK, 0, True, D0, D1
            )  # fmt: skip
    if RATIO:
        p_dz += gl.program_id(0).to(gl.int64) * D
        _store_sums(p_dz, 0, dz0, D, D0, L0)
        if D1 > 0:
            _store_sums(p_dz, D0, dz1, D, D1, L1)


class _Plan(NamedTuple):
    """The launch, and how many ranges of queries leave a part of dz."""

    ranges: int
    call: KernelCall


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    feature_map: str, ratio: bool, scale: float, eps: float,
) -> _Plan:  # fmt: skip
    d_out, matrix, query, dq = tensors
    batch, num_queries, heads, head_dim = query.shape
    rows, block = batch * heads, configs.ROWS_BLOCK
    parts = configs.parts_of(head_dim, "d", "bwd_dq_hopper", query.dtype)
    ranges, share = configs.even_splits_of(num_queries, rows, query, block, cost=0)
    state = boxes_of_state(matrix, parts, parts)
    # They come as parts of D first.
    state[1], state[2] = state[2], state[1]
    boxes = [
        *((0, box) for box in boxes_of(d_out, block, *parts)),
        *((1, box) for box in state),
        *((2, box) for box in boxes_of(dq, block, *parts)),
        *((3, box) for box in boxes_of(dq, block, *parts)),
    ]
    vector = common_vector(query)
    numbers = (num_queries, share, rows, heads, scale, eps, *strides_in_vectors(vector, query))
    constants = {
        "D": head_dim, "D0": parts[0], "D1": parts[1],
        "FEATURE": feature_map, "RATIO": ratio, "VECTOR": vector, "BLOCK": block, "num_warps": 8,
    }  # fmt: skip
    kernel, grid = _linear_attention_bwd_dq_hopper_kernel, (rows * ranges,)
    return _Plan(ranges, KernelCall(kernel, grid, numbers, constants, boxes, only_boxes=4))


_PLANS = Plans(_plan)


def query_grad_hopper(
    d_out: Tensor, query: Tensor, dq: Tensor, matrix: Tensor, row: Tensor,
    feature_map: str, ratio: bool, scale: float, eps: float, memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills dq from the state `matrix` ``(B * H, E, D)`` with its `row` z, ``(B * H * D)``; for
    ratio returns x ``(B, N, H, D)`` and dz, without it the tensors of the queries and of z."""
    tensors, options = (d_out, matrix, query, dq), (feature_map, ratio, scale, eps)
    ranges, call = _PLANS(tensors, *options, memo=memo)
    if not ratio:
        call(d_out, matrix, dq, dq, query, row, row)
        return query, row
    x = empty(*query.shape, like=query)
    parts = empty(ranges, row.numel(), like=query, dtype=torch.float32)
    call(d_out, matrix, dq, x, query, row, parts)
    return x, parts[0] if ranges == 1 else parts.sum(0)
