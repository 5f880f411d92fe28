"""Sums over tokens with phi(k) as the first operand of the product, for the ratio alone.

`triton_blocks.moments` forms S^T = sum_j v_j phi(k_j)^T: the tensor cores read the second operand
from shared memory, so that a step writes phi(k) back there and needs a fence, which waits for the
loads of later steps as well. S = sum_j phi(k_j) v_j^T meets them from registers and needs none. It
pays where loads run ahead (`configs.keys_first`), and costs where they do not.

z_d = sum_j g_j phi(k_j)_d keeps its tokens apart, (D, BLOCK) numbers, until the end. Parts of a
head are as in `triton_blocks`.
"""

import triton
import triton.language as tl

from .triton_blocks import (
    feature,
    feature_grad,
    load_tile,
    row_dot,
    rows_dot_vector,
    rows_times_rows,
    store_tile,
)


@triton.jit
def features_transposed(x, m_row, column, COLUMNS, WIDTH: tl.constexpr, FEATURE: tl.constexpr):
    """phi of a tile of rows as (WIDTH, rows); zero in all padding, also where phi(0) is not."""
    y = feature(tl.trans(x), FEATURE)
    if FEATURE == "elu1":
        o_column = column + tl.arange(0, WIDTH)
        y = tl.where((o_column < COLUMNS)[:, None] & m_row[None, :], y, 0.0).to(x.dtype)
    return y


@triton.jit
def empty_sums(
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, BLOCK: tl.constexpr
):
    s00 = tl.zeros((D0, E0), tl.float32)
    z0 = tl.zeros((D0, BLOCK), tl.float32)
    s01, s10, s11, z1 = 0.0, 0.0, 0.0, 0.0
    if D1 > 0:
        s01 = tl.zeros((D1, E0), tl.float32)
        z1 = tl.zeros((D1, BLOCK), tl.float32)
    if E1 > 0:
        s10 = tl.zeros((D0, E1), tl.float32)
    if D1 > 0 and E1 > 0:
        s11 = tl.zeros((D1, E1), tl.float32)
    return s00, s01, s10, s11, z0, z1


@triton.jit
def add_tokens(
    k0, k1, v0, v1, g0, g1, s00, s01, s10, s11, z0, z1, D1: tl.constexpr, E1: tl.constexpr
):
    """Adds k v to the state and g to z; k and g are (D, BLOCK), v is (BLOCK, E)."""
    s00 = tl.dot(k0, v0, s00, input_precision="ieee")
    if D1 > 0:
        s01 = tl.dot(k1, v0, s01, input_precision="ieee")
    if E1 > 0:
        s10 = tl.dot(k0, v1, s10, input_precision="ieee")
        if D1 > 0:
            s11 = tl.dot(k1, v1, s11, input_precision="ieee")
    z0 += g0.to(tl.float32)
    if D1 > 0:
        z1 += g1.to(tl.float32)
    return s00, s01, s10, s11, z0, z1


@triton.jit
def finish_sums(s00, s01, s10, s11, z0, z1, D1: tl.constexpr, E1: tl.constexpr):
    """The state as everything else takes it, S^T, and z as a vector."""
    s00 = tl.trans(s00)
    if D1 > 0:
        s01 = tl.trans(s01)
    if E1 > 0:
        s10 = tl.trans(s10)
        if D1 > 0:
            s11 = tl.trans(s11)
    z0 = tl.sum(z0, 1)
    if D1 > 0:
        z1 = tl.sum(z1, 1)
    return s00, s01, s10, s11, z0, z1


@triton.jit
def moments_keys_first(
    p_k, p_v, k_stride, v_stride, start, stop,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S^T = sum_j v_j phi(k_j)^T and z = sum_j phi(k_j) over start <= j < stop, in float32."""
    s00, s01, s10, s11, z0, z1 = empty_sums(D0, D1, E0, E1, BLOCK)
    for n in range(start, stop, BLOCK):
        k1, v1 = 0.0, 0.0
        o_n = n + tl.arange(0, BLOCK)
        m_n = o_n < stop
        o_k = o_n.to(tl.int64) * k_stride
        o_v = o_n.to(tl.int64) * v_stride
        k0 = features_transposed(load_tile(p_k, o_k, m_n, 0, D, D0), m_n, 0, D, D0, FEATURE)
        v0 = load_tile(p_v, o_v, m_n, 0, E, E0)
        if D1 > 0:
            k1 = load_tile(p_k, o_k, m_n, D0, D, D1)
            k1 = features_transposed(k1, m_n, D0, D, D1, FEATURE)
        if E1 > 0:
            v1 = load_tile(p_v, o_v, m_n, E0, E, E1)
        s00, s01, s10, s11, z0, z1 = add_tokens(
            k0, k1, v0, v1, k0, k1, s00, s01, s10, s11, z0, z1, D1, E1
        )
    return finish_sums(s00, s01, s10, s11, z0, z1, D1, E1)


@triton.jit
def query_sweep_keys_first(
    p_do, p_q, p_dq, do_stride, q_stride, dq_stride, start, stop,
    s00, s01, s10, s11, z0, z1, scale, eps,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dq of the queries start <= i < stop, returns their part of dS^T and dz; formulas in
    `triton_bwd`. Queries stand where keys do in a sum over keys."""
    d00, d01, d10, d11, dz0, dz1 = empty_sums(D0, D1, E0, E1, BLOCK)
    for m in range(start, stop, BLOCK):
        o_m = m + tl.arange(0, BLOCK)
        m_m = o_m < stop
        o_do = o_m.to(tl.int64) * do_stride
        o_q = o_m.to(tl.int64) * q_stride
        o_dq = o_m.to(tl.int64) * dq_stride
        q1, f1, g1, t1, x1, y1 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        q0 = load_tile(p_q, o_q, m_m, 0, D, D0)
        g0 = load_tile(p_do, o_do, m_m, 0, E, E0)
        f0 = features_transposed(q0, m_m, 0, D, D0, FEATURE)
        y0 = feature(q0, FEATURE)
        if D1 > 0:
            q1 = load_tile(p_q, o_q, m_m, D0, D, D1)
            f1 = features_transposed(q1, m_m, D0, D, D1, FEATURE)
            y1 = feature(q1, FEATURE)
        if E1 > 0:
            g1 = load_tile(p_do, o_do, m_m, E0, E, E1)
        t0 = rows_times_rows(g0, g1, s00, s10, E1, "ieee")
        if D1 > 0:
            t1 = rows_times_rows(g0, g1, s01, s11, E1, "ieee")
        weight = scale / (scale * rows_dot_vector(y0, y1, z0, z1, D1) + eps)
        weight = tl.where(m_m, weight, 0.0)
        gain = -weight * row_dot(y0, y1, t0, t1, D1)
        t0 = (t0 + gain[:, None] * z0[None, :]) * weight[:, None]
        store_tile(p_dq, o_dq, m_m, 0, feature_grad(q0, t0, FEATURE), D, D0)
        f0 = f0.to(tl.float32) * weight[None, :]
        x0 = f0 * gain[None, :]
        f0 = f0.to(g0.dtype)
        if D1 > 0:
            t1 = (t1 + gain[:, None] * z1[None, :]) * weight[:, None]
            store_tile(p_dq, o_dq, m_m, D0, feature_grad(q1, t1, FEATURE), D, D1)
            f1 = f1.to(tl.float32) * weight[None, :]
            x1 = f1 * gain[None, :]
            f1 = f1.to(g0.dtype)
        d00, d01, d10, d11, dz0, dz1 = add_tokens(
            f0, f1, g0, g1, x0, x1, d00, d01, d10, d11, dz0, dz1, D1, E1
        )
    return finish_sums(d00, d01, d10, d11, dz0, dz1, D1, E1)
