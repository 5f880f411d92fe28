"""Backward kernels of linear attention and their launchers.

The state is summed again, not saved: it costs two of nine reads and writes and leaves the forward
pass one output. With t_i = do_i S^T, w_i = s / (s phi(q_i) . z + eps), u_i = phi(q_i) . t_i:

ratio: dphi(q_i) = w_i t_i - w_i^2 u_i z, dS = sum_i phi(q_i)^T w_i do_i,
    dz = -sum_i w_i^2 u_i phi(q_i), dphi(k_j) = v_j dS^T + dz, dv_j = phi(k_j) dS
covariance: dphi(q_i) = t_i (s / N in S), dS = s / N sum_i phi(q_i)^T do_i,
    dphi(k_j) = (v_j - mean v) dS^T, dv_j = (phi(k_j) - mean phi(k)) dS + sum_i do_i / N
none: as ratio with w_i = s and no z.

Where t_i and u_i z cancel, values far from zero take the digits of the rest. All of ratio holds as
well for values v_j - c, if -w_i^2 u_i gains eps w_i / (s phi(q_i) . z + eps) do_i . c: float16 is
SHIFTED so, since its products have no more digits than its results.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import common_vector, device_guard, empty, strides_in_vectors, unit_last
from .._common.plans import Plans
from . import configs, ways
from .triton_blocks import (
    centre,
    empty_moments,
    feature_grad,
    fold_gains,
    folds,
    gain_rows,
    load_features,
    load_state,
    load_tile,
    load_vectors,
    moment_step,
    moments,
    row_dot,
    rows_dot_vector,
    rows_times_rows,
    scale_cast,
    shifts_of,
    store_state,
    store_tile,
    store_vectors,
    sum_rows,
    value_shifts_of,
)
from .triton_bwd_wide import key_side_wide, query_side_wide
from .triton_keys_first import moments_keys_first, query_sweep_keys_first
from .triton_state import State, empty_parts, forward_state, reduce_parts, transposed


@triton.jit
def _query_sweep(
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
def _key_sweep(
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


@triton.jit(
    do_not_specialize=[
        "num_queries", "tokens_per_program", "rows", "heads", "scale", "factor", "eps",
        "do_sb", "q_sb", "dq_sb",
    ]
)  # fmt: skip
def _linear_attention_bwd_queries_kernel(
    p_do, p_q, p_dq, p_state, p_key_row, p_value_row, p_ds, p_dz, p_b,
    num_queries, tokens_per_program, rows, heads, scale, factor, eps,
    do_sb, do_sn, do_sh, q_sb, q_sn, q_sh, dq_sb, dq_sn, dq_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, KEYS_FIRST: tl.constexpr,
    WIDE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * ranges): dq of a range of queries and its part of dS^T."""
    RATIO: tl.constexpr = NORMALIZER == "ratio"
    CENTRED: tl.constexpr = NORMALIZER == "covariance"
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_q.dtype.element_ty
    row = tl.program_id(0) % rows
    part = tl.program_id(0) // rows
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    row = row.to(tl.int64)
    o_part = part.to(tl.int64) * rows + row
    start = part * tokens_per_program
    stop = tl.minimum(start + tokens_per_program, num_queries)
    s00, s01, s10, s11 = load_state(p_state + row * D * E, D, D0, D1, E, E0, E1, DTYPE)
    z0, z1, cv0, cv1 = 0.0, 0.0, 0.0, 0.0
    if RATIO:
        z0, z1 = load_vectors(p_key_row + row * D, D, D0, D1)
    if RATIO and WIDE:
        cv0, cv1 = load_vectors(p_value_row + row * E, E, E0, E1)
    p_do += (batch * do_sb + head * do_sh) * VECTOR
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_dq += (batch * dq_sb + head * dq_sh) * VECTOR
    if KEYS_FIRST:
        d00, d01, d10, d11, dz0, dz1 = query_sweep_keys_first(
            p_do, p_q, p_dq, do_sn * VECTOR, q_sn * VECTOR, dq_sn * VECTOR, start, stop,
            s00, s01, s10, s11, z0, z1, scale, eps,
            D, D0, D1, E, E0, E1, FEATURE, BLOCK,
        )  # fmt: skip
    else:
        d00, d01, d10, d11, dz0, dz1, b0, b1 = _query_sweep(
            p_do, p_q, p_dq, do_sn * VECTOR, q_sn * VECTOR, dq_sn * VECTOR, start, stop,
            s00, s01, s10, s11, z0, z1, cv0, cv1, scale, factor, eps,
            D, D0, D1, E, E0, E1, FEATURE, RATIO, CENTRED, WIDE, BLOCK,
        )  # fmt: skip
    store_state(p_ds + o_part * D * E, d00, d01, d10, d11, D, D0, D1, E, E0, E1)
    if RATIO:
        store_vectors(p_dz + o_part * D, dz0, dz1, D, D0, D1)
    if CENTRED:
        store_vectors(p_b + o_part * E, b0, b1, E, E0, E1)


@triton.jit(
    do_not_specialize=[
        "num_keys", "tokens_per_program", "rows", "heads", "k_sb", "v_sb", "dk_sb", "dv_sb",
    ]
)  # fmt: skip
def _linear_attention_bwd_keys_kernel(
    p_k, p_v, p_dk, p_dv, p_dstate, p_dkey_row, p_dvalue_row, p_key_row, p_value_row,
    num_keys, tokens_per_program, rows, heads,
    k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, dk_sb, dk_sn, dk_sh, dv_sb, dv_sn, dv_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * ranges): dk and dv of a range of tokens from the finished dS^T."""
    RATIO: tl.constexpr = NORMALIZER == "ratio"
    CENTRED: tl.constexpr = NORMALIZER == "covariance"
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_k.dtype.element_ty
    row = tl.program_id(0) % rows
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    row = row.to(tl.int64)
    start = (tl.program_id(0) // rows) * tokens_per_program
    stop = tl.minimum(start + tokens_per_program, num_keys)
    d00, d01, d10, d11 = load_state(p_dstate + row * D * E, D, D0, D1, E, E0, E1, DTYPE)
    dz0, dz1, b0, b1, ck0, ck1, cv0, cv1 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if RATIO:
        dz0, dz1 = load_vectors(p_dkey_row + row * D, D, D0, D1)
    if CENTRED:
        b0, b1 = load_vectors(p_dvalue_row + row * E, E, E0, E1)
        ck0, ck1 = load_vectors(p_key_row + row * D, D, D0, D1)
    if CENTRED or (RATIO and WIDE):
        cv0, cv1 = load_vectors(p_value_row + row * E, E, E0, E1)
    _key_sweep(
        p_k + (batch * k_sb + head * k_sh) * VECTOR,
        p_v + (batch * v_sb + head * v_sh) * VECTOR,
        p_dk + (batch * dk_sb + head * dk_sh) * VECTOR,
        p_dv + (batch * dv_sb + head * dv_sh) * VECTOR,
        k_sn * VECTOR, v_sn * VECTOR, dk_sn * VECTOR, dv_sn * VECTOR, start, stop,
        d00, d01, d10, d11, dz0, dz1, b0, b1, ck0, ck1, cv0, cv1,
        D, D0, D1, E, E0, E1, FEATURE, RATIO, CENTRED, WIDE, BLOCK,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "heads", "scale", "eps",
        "do_sb", "q_sb", "k_sb", "v_sb", "dq_sb", "dk_sb", "dv_sb",
    ]
)  # fmt: skip
def _linear_attention_bwd_fused_kernel(
    p_do, p_q, p_k, p_v, p_dq, p_dk, p_dv, num_queries, num_keys, heads, scale, eps,
    do_sb, do_sn, do_sh, q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh,
    dq_sb, dq_sn, dq_sh, dk_sb, dk_sn, dk_sh, dv_sb, dv_sn, dv_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, KEYS_FIRST: tl.constexpr,
    WIDE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All three gradients. Grid (B * H): a program sums the state of its head, sweeps the queries
    for dq and dS, then the keys for dk and dv."""
    RATIO: tl.constexpr = NORMALIZER == "ratio"
    CENTRED: tl.constexpr = NORMALIZER == "covariance"
    SHIFTED: tl.constexpr = RATIO and WIDE
    FOLD: tl.constexpr = folds(RATIO or CENTRED, E, E0, E1, p_q.dtype.element_ty)
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_q.dtype.element_ty
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR
    ck0, ck1, cv0, cv1 = 0.0, 0.0, 0.0, 0.0
    if CENTRED:
        ck0, ck1 = shifts_of(p_k, k_sn * VECTOR, num_keys, D, D0, D1, FEATURE)
    if CENTRED or SHIFTED:
        cv0, cv1 = value_shifts_of(p_v, v_sn * VECTOR, num_keys, E, E0, E1, SHIFTED)
    if KEYS_FIRST:
        s00, s01, s10, s11, z0, z1 = moments_keys_first(
            p_k, p_v, k_sn * VECTOR, v_sn * VECTOR, 0, num_keys,
            D, D0, D1, E, E0, E1, FEATURE, BLOCK,
        )  # fmt: skip
    else:
        s00, s01, s10, s11, z0, z1, a0, a1 = moments(
            p_k, p_v, p_k, p_k, k_sn * VECTOR, v_sn * VECTOR, 0, num_keys, ck0, ck1, cv0, cv1,
            D, D0, D1, E, E0, E1, FEATURE, CENTRED, SHIFTED, False,
            RATIO or CENTRED, CENTRED, FOLD, WIDE, BLOCK,
        )  # fmt: skip
    # Factor of the constant weights of covariance and none; ratio weighs each query.
    factor = scale
    if CENTRED:
        factor = scale / num_keys
        s00, s01, s10, s11 = centre(s00, s01, s10, s11, z0, z1, a0, a1, num_keys, D1, E1)
        ck0 += z0 / num_keys
        cv0 += a0 / num_keys
        if D1 > 0:
            ck1 += z1 / num_keys
        if E1 > 0:
            cv1 += a1 / num_keys
    s00, s01, s10, s11 = scale_cast(s00, s01, s10, s11, 1.0, DTYPE, D1, E1)
    p_do += (batch * do_sb + head * do_sh) * VECTOR
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_dq += (batch * dq_sb + head * dq_sh) * VECTOR
    b0, b1 = 0.0, 0.0
    if KEYS_FIRST:
        d00, d01, d10, d11, dz0, dz1 = query_sweep_keys_first(
            p_do, p_q, p_dq, do_sn * VECTOR, q_sn * VECTOR, dq_sn * VECTOR, 0, num_queries,
            s00, s01, s10, s11, z0, z1, scale, eps,
            D, D0, D1, E, E0, E1, FEATURE, BLOCK,
        )  # fmt: skip
    else:
        d00, d01, d10, d11, dz0, dz1, b0, b1 = _query_sweep(
            p_do, p_q, p_dq, do_sn * VECTOR, q_sn * VECTOR, dq_sn * VECTOR, 0, num_queries,
            s00, s01, s10, s11, z0, z1, cv0, cv1, scale, factor, eps,
            D, D0, D1, E, E0, E1, FEATURE, RATIO, CENTRED, WIDE, BLOCK,
        )  # fmt: skip
    if RATIO:
        factor = 1.0
    if CENTRED:
        b0 /= num_keys
        if E1 > 0:
            b1 /= num_keys
    d00, d01, d10, d11 = scale_cast(d00, d01, d10, d11, factor, DTYPE, D1, E1)
    _key_sweep(
        p_k, p_v,
        p_dk + (batch * dk_sb + head * dk_sh) * VECTOR,
        p_dv + (batch * dv_sb + head * dv_sh) * VECTOR,
        k_sn * VECTOR, v_sn * VECTOR, dk_sn * VECTOR, dv_sn * VECTOR, 0, num_keys,
        d00, d01, d10, d11, dz0, dz1, b0, b1, ck0, ck1, cv0, cv1,
        D, D0, D1, E, E0, E1, FEATURE, RATIO, CENTRED, WIDE, BLOCK,
    )  # fmt: skip


def _constants(
    kernel: str, launch: configs.Launch, vector: int, query: Tensor, value: Tensor,
    feature_map: str, normalizer: str,
) -> dict[str, object]:  # fmt: skip
    d0, d1 = configs.parts_of(query.shape[3], "d", kernel, query.dtype)
    e0, e1 = configs.parts_of(value.shape[3], "e", kernel, query.dtype)
    return {
        "D": query.shape[3], "D0": d0, "D1": d1, "E": value.shape[3], "E0": e0, "E1": e1,
        "FEATURE": configs.kernel_feature(feature_map, query), "NORMALIZER": normalizer,
        "WIDE": query.dtype == torch.float16, "VECTOR": vector, "BLOCK": launch.block,
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip


def _keys_first(kernel: str, query: Tensor, value: Tensor, normalizer: str) -> bool:
    width = max(query.shape[3], value.shape[3])
    return normalizer == "ratio" and configs.keys_first(kernel, query, width)


def _plan(
    tensors: tuple[Tensor, ...], feature_map: str, normalizer: str, scale: float, eps: float
) -> tuple[str, KernelCall | None]:
    """The way that runs, and the launch that is all of the fused one."""
    _, query, key, value = tensors
    way = ways.way_of("bwd", query, key, value, normalizer)
    if way != "fused":
        return way, None
    launch = configs.launch_of("bwd_fused", query, max(query.shape[3], value.shape[3]))
    grads = [x.new_empty(x.shape, device="meta") for x in (query, key, value)]
    vector = common_vector(*tensors, *grads)
    strides = strides_in_vectors(vector, *tensors, *grads)
    batch, num_queries, heads, _ = query.shape
    numbers = (num_queries, key.shape[1], heads, scale, eps, *strides)
    constants = _constants("bwd_fused", launch, vector, query, value, feature_map, normalizer)
    constants["KEYS_FIRST"] = _keys_first("bwd_fused", query, value, normalizer)
    return way, KernelCall(_linear_attention_bwd_fused_kernel, (batch * heads,), numbers, constants)


_PLANS = Plans(_plan)


def _plan_queries(
    tensors: tuple[Tensor, ...], feature_map: str, normalizer: str, scale: float, eps: float
) -> tuple[int, KernelCall]:
    """For d_out, query and dq: the number of ranges of queries, and the launch that sums each."""
    d_out, query, _ = tensors
    batch, num_queries, heads, head_dim = query.shape
    keys_first = _keys_first("bwd_queries", query, d_out, normalizer)
    kernel = "bwd_queries_keys_first" if keys_first else "bwd_queries"
    launch = configs.launch_of(kernel, query, max(head_dim, d_out.shape[3]))
    ranges, share = configs.splits_of(num_queries, batch * heads, query, launch)
    vector = common_vector(*tensors)
    factor = scale if normalizer == "none" else 1.0
    strides = strides_in_vectors(vector, *tensors)
    numbers = (num_queries, share, batch * heads, heads, scale, factor, eps, *strides)
    constants = _constants(kernel, launch, vector, query, d_out, feature_map, normalizer)
    constants["KEYS_FIRST"] = keys_first
    grid = (batch * heads * ranges,)
    return ranges, KernelCall(_linear_attention_bwd_queries_kernel, grid, numbers, constants)


_QUERY_PLANS = Plans(_plan_queries)


def _query_side(
    d_out: Tensor, query: Tensor, dq: Tensor, state: State, num_keys: int,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> State:  # fmt: skip
    """Writes dq, returns dS with its rows: dz for ratio, sum_i do_i / N for covariance."""
    ranges, call = _QUERY_PLANS((d_out, query, dq), feature_map, normalizer, scale, eps)
    rows = query.shape[0] * query.shape[2]
    parts = empty_parts(ranges, rows, query.shape[3], d_out.shape[3], query)
    call(d_out, query, dq, *state, *parts[:3])
    factor = {"ratio": 1.0, "none": scale, "covariance": scale / num_keys}[normalizer]
    return reduce_parts(
        parts, query, factor=factor, count=num_keys, centred=False,
        sum_k=normalizer == "ratio", sum_v=normalizer == "covariance",
    )  # fmt: skip


def _plan_keys(tensors: tuple[Tensor, ...], feature_map: str, normalizer: str) -> KernelCall:
    key, value, _, _ = tensors
    batch, num_keys, heads, head_dim = key.shape
    launch = configs.launch_of("bwd_keys", key, max(head_dim, value.shape[3]))
    ranges, share = configs.splits_of(num_keys, batch * heads, key, launch)
    vector = common_vector(*tensors)
    numbers = (num_keys, share, batch * heads, heads, *strides_in_vectors(vector, *tensors))
    constants = _constants("bwd_keys", launch, vector, key, value, feature_map, normalizer)
    grid = (batch * heads * ranges,)
    return KernelCall(_linear_attention_bwd_keys_kernel, grid, numbers, constants)


_KEY_PLANS = Plans(_plan_keys)


def _key_side(
    key: Tensor, value: Tensor, dk: Tensor, dv: Tensor, d_state: State, state: State,
    feature_map: str, normalizer: str,
) -> None:  # fmt: skip
    call = _KEY_PLANS((key, value, dk, dv), feature_map, normalizer)
    call(key, value, dk, dv, *d_state, state.key_row, state.value_row)


def linear_attention_bwd(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float,
    matrix: Tensor | None = None, key_row: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients, contiguous. `matrix` and `key_row` are a state that the forward pass has kept."""
    dq, dk, dv = (empty(*x.shape, like=x) for x in (query, key, value))
    if 0 in (*query.shape, *value.shape):
        return dq.zero_(), dk.zero_(), dv.zero_()
    d_out, query, key, value = (unit_last(x) for x in (d_out, query, key, value))
    options = (feature_map, normalizer, scale, eps)
    with device_guard(query):
        way, fused = _PLANS((d_out, query, key, value), *options)
        if fused is not None:
            fused(d_out, query, key, value, dq, dk, dv)
            return dq, dk, dv
        if way == "quadratic":
            from .hopper_quadratic_bwd import backward_quadratic_hopper  # not in every triton

            backward_quadratic_hopper((d_out, query, key, value), (dq, dk, dv), *options)
            return dq, dk, dv
        query_side = query_side_wide if way == "wide" else _query_side
        key_side = key_side_wide if way == "wide" else _key_side
        shifted = normalizer == "ratio" and query.dtype == torch.float16
        state = State(matrix, key_row, key_row) if matrix is not None else forward_state(
            key, value, feature_map, normalizer, scale, shifted
        )  # fmt: skip
        d_state = query_side(d_out, query, dq, state, key.shape[1], *options)
        key_side(key, value, dk, dv, d_state, state, feature_map, normalizer)
    return dq, dk, dv
