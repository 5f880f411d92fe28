"""Sweeps of the backward pass around a state in registers: over queries, and over keys and values.

The mathematics is that of `triton_bwd.py`.
"""

import triton
import triton.language as tl

from .triton_blocks import (
    empty_moments,
    feature_grad,
    fold_gains,
    folds,
    gain_rows,
    load_features,
    load_tile,
    moment_step,
    row_dot,
    rows_dot_vector,
    rows_times_rows,
    store_tile,
    sum_rows,
)
from .triton_state import transposed


@triton.jit
def query_sweep(
    p_do, p_q, p_dq, do_stride, q_stride, dq_stride, start, stop,
    s00, s01, s10, s11, z0, z1, cv0, cv1, scale, factor, eps,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, RATIO: tl.constexpr, SUM_V: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dq of the queries start <= i < stop; their part of dS^T without its factor, of dz
    and, with SUM_V, of sum do."""
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_q.dtype.element_ty
    PRECISION: tl.constexpr = "tf32" if WIDE else "ieee"
    FOLD: tl.constexpr = folds(RATIO, E, E0, E1, p_q.dtype.element_ty)
    OWN: tl.constexpr = RATIO and not FOLD
    d00, d01, d10, d11, dz0, dz1, b0, b1 = empty_moments(D0, D1, E0, E1, OWN, SUM_V)
    for m in range(start, stop, BLOCK):
        o_m = m + tl.arange(0, BLOCK)
        m_m = o_m < stop
        o_do = o_m.to(tl.int64) * do_stride
        o_q = o_m.to(tl.int64) * q_stride
        o_dq = o_m.to(tl.int64) * dq_stride
        q1, f1, g1, t1, gain = 0.0, 0.0, 0.0, 0.0, 0.0
        q0 = load_tile(p_q, o_q, m_m, 0, D, D0)
        f0 = load_features(p_q, o_q, m_m, 0, D, D0, FEATURE)
        g0 = load_tile(p_do, o_do, m_m, 0, E, E0).to(DTYPE)
        if D1 > 0:
            q1 = load_tile(p_q, o_q, m_m, D0, D, D1)
            f1 = load_features(p_q, o_q, m_m, D0, D, D1, FEATURE)
        if E1 > 0:
            g1 = load_tile(p_do, o_do, m_m, E0, E, E1).to(DTYPE)
        t0 = rows_times_rows(g0, g1, s00, s10, E1, PRECISION)
        if D1 > 0:
            t1 = rows_times_rows(g0, g1, s01, s11, E1, PRECISION)
        if RATIO:
            inverse = 1.0 / (scale * rows_dot_vector(f0, f1, z0, z1, D1) + eps)
            inverse = tl.where(m_m, inverse, 0.0)
            weight = scale * inverse
            gain = -weight * row_dot(f0, f1, t0, t1, D1)
            if WIDE:
                gain += eps * inverse * rows_dot_vector(g0, g1, cv0, cv1, E1)
            t0 = (t0 + gain[:, None] * z0[None, :]) * weight[:, None]
            f0 = f0.to(tl.float32) * weight[:, None]
            if D1 > 0:
                t1 = (t1 + gain[:, None] * z1[None, :]) * weight[:, None]
                f1 = f1.to(tl.float32) * weight[:, None]
        else:
            t0 *= factor
            if D1 > 0:
                t1 *= factor
        store_tile(p_dq, o_dq, m_m, 0, feature_grad(q0, t0, FEATURE), D, D0)
        f0 = f0.to(DTYPE)
        if D1 > 0:
            store_tile(p_dq, o_dq, m_m, D0, feature_grad(q1, t1, FEATURE), D, D1)
            f1 = f1.to(DTYPE)
        gains = gain_rows(m_m, gain, RATIO, DTYPE, BLOCK)
        if FOLD:
            g1 = fold_gains(g1, m_m, gain, E - E0, E1, RATIO)
        d00, d01, d10, d11, dz0, dz1, b0, b1 = moment_step(
            f0, f1, g0, g1, gains, d00, d01, d10, d11, dz0, dz1, b0, b1,
            D1, E1, OWN, SUM_V, PRECISION,
        )  # fmt: skip
    dz0, dz1, b0, b1 = sum_rows(d10, d11, dz0, dz1, b0, b1, E - E0, D1, E1, FOLD, RATIO, SUM_V)
    return d00, d01, d10, d11, dz0, dz1, b0, b1


@triton.jit
def key_sweep(
    p_k, p_v, p_dk, p_dv, k_stride, v_stride, dk_stride, dv_stride, start, stop,
    d00, d01, d10, d11, dz0, dz1, b0, b1, ck0, ck1, cv0, cv1,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, RATIO: tl.constexpr, CENTRED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv of the tokens start <= j < stop from a finished dS^T."""
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_k.dtype.element_ty
    PRECISION: tl.constexpr = "tf32" if WIDE else "ieee"
    for n in range(start, stop, BLOCK):
        o_n = n + tl.arange(0, BLOCK)
        m_n = o_n < stop
        o_k = o_n.to(tl.int64) * k_stride
        o_v = o_n.to(tl.int64) * v_stride
        o_dk = o_n.to(tl.int64) * dk_stride
        o_dv = o_n.to(tl.int64) * dv_stride
        k1, f1, v1 = 0.0, 0.0, 0.0
        k0 = load_tile(p_k, o_k, m_n, 0, D, D0)
        f0 = load_features(p_k, o_k, m_n, 0, D, D0, FEATURE)
        v0 = load_tile(p_v, o_v, m_n, 0, E, E0)
        if D1 > 0:
            k1 = load_tile(p_k, o_k, m_n, D0, D, D1)
            f1 = load_features(p_k, o_k, m_n, D0, D, D1, FEATURE)
        if E1 > 0:
            v1 = load_tile(p_v, o_v, m_n, E0, E, E1)
        if CENTRED:
            f0 = f0.to(tl.float32) - ck0[None, :]
            if D1 > 0:
                f1 = f1.to(tl.float32) - ck1[None, :]
        if CENTRED or (RATIO and WIDE):
            v0 = v0.to(tl.float32) - cv0[None, :]
            if E1 > 0:
                v1 = v1.to(tl.float32) - cv1[None, :]
        f0, v0 = f0.to(DTYPE), v0.to(DTYPE)
        if D1 > 0:
            f1 = f1.to(DTYPE)
        if E1 > 0:
            v1 = v1.to(DTYPE)
        dk0 = rows_times_rows(v0, v1, d00, d10, E1, PRECISION)
        dv0 = rows_times_rows(f0, f1, tl.trans(d00), transposed(d01, D1), D1, PRECISION)
        if RATIO:
            dk0 += dz0[None, :]
        if CENTRED:
            dv0 += b0[None, :]
        store_tile(p_dk, o_dk, m_n, 0, feature_grad(k0, dk0, FEATURE), D, D0)
        store_tile(p_dv, o_dv, m_n, 0, dv0, E, E0)
        if D1 > 0:
            dk1 = rows_times_rows(v0, v1, d01, d11, E1, PRECISION)
            if RATIO:
                dk1 += dz1[None, :]
            store_tile(p_dk, o_dk, m_n, D0, feature_grad(k1, dk1, FEATURE), D, D1)
        if E1 > 0:
            dv1 = rows_times_rows(f0, f1, tl.trans(d10), transposed(d11, D1), D1, PRECISION)
            if CENTRED:
                dv1 += b1[None, :]
            store_tile(p_dv, o_dv, m_n, E0, dv1, E, E1)
