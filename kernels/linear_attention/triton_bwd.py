"""Backward kernels of linear attention and their launchers.

The state is summed again, not saved: it costs two of nine reads and writes and leaves the forward
pass one output. With t_i = do_i S^T, d_i = s phi(q_i) . z + eps, w_i = s / d_i, u_i = phi(q_i) . t_i:

    ratio:       dphi(q_i) = w_i t_i - w_i^2 u_i z,  dS = sum_i phi(q_i)^T w_i do_i,
                 dz = -sum_i w_i^2 u_i phi(q_i),     dphi(k_j) = v_j dS^T + dz,  dv_j = phi(k_j) dS
    covariance:  dphi(q_i) = t_i (s / N in S),       dS = s / N sum_i phi(q_i)^T do_i,
                 dphi(k_j) = (v_j - mean v) dS^T,    dv_j = (phi(k_j) - mean phi(k)) dS + sum_i do_i / N
    none:        as ratio with w_i = s and no z.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.launch import (
    common_vector,
    device_guard,
    empty,
    strides_in_vectors,
    unit_last,
)
from . import configs
from .triton_blocks import (
    empty_moments,
    feature,
    feature_grad,
    gain_columns,
    load_features,
    load_tile,
    load_vector,
    moment_step,
    moments,
    row_dot,
    rows_dot_vector,
    rows_times,
    rows_times_state,
    shift_of,
    store_tile,
)
from .triton_fwd import State, forward_state, sweep


@triton.jit(do_not_specialize=["num_queries", "rows", "heads", "do_sb", "q_sb", "dq_sb"])
def _linear_attention_bwd_dq_kernel(
    p_do, p_q, p_dq, p_state, p_key_row, p_weight, p_gain, num_queries, rows, heads, scale, eps,
    do_sb, do_sn, do_sh, q_sb, q_sn, q_sh, dq_sb, dq_sn, dq_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dq, and for ratio the weights w_i and -w_i^2 u_i of the sums over queries. Grid
    (B * H * tiles): a program writes one tile of queries."""
    row = tl.program_id(0) % rows
    tile = tl.program_id(0) // rows
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    row = row.to(tl.int64)
    o_m = tile * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < num_queries
    o_do = o_m.to(tl.int64) * (do_sn * VECTOR)
    o_q = o_m.to(tl.int64) * (q_sn * VECTOR)
    o_dq = o_m.to(tl.int64) * (dq_sn * VECTOR)
    p_do += (batch * do_sb + head * do_sh) * VECTOR
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_dq += (batch * dq_sb + head * dq_sh) * VECTOR
    t0, t1, _ = rows_times_state(
        p_do, p_state + row * D * E, p_do, p_do, o_do, m_m, 1, E,
        E, D, D0, D1, "identity", False, False, WIDE, BLOCK, BLOCK_R,
    )  # fmt: skip
    q0 = load_tile(p_q, o_q, m_m, 0, D, D0)
    q1 = 0.0
    if D1 > 0:
        q1 = load_tile(p_q, o_q, m_m, D0, D, D1)
    if NORMALIZER == "none":
        t0 *= scale
        if D1 > 0:
            t1 *= scale
    if NORMALIZER == "ratio":
        p_key_row += row * D
        z0 = load_vector(p_key_row, 0, D, D0)
        f0 = feature(q0, FEATURE)
        z1, f1 = 0.0, 0.0
        if D1 > 0:
            z1 = load_vector(p_key_row, D0, D, D1)
            f1 = feature(q1, FEATURE)
        weight = scale / (scale * rows_dot_vector(f0, f1, z0, z1, D1) + eps)
        # In this order: the square of the weight of an all-zero query would overflow.
        gain = -(weight * row_dot(f0, f1, t0, t1, D1)) * weight
        t0 = t0 * weight[:, None] + gain[:, None] * z0[None, :]
        if D1 > 0:
            t1 = t1 * weight[:, None] + gain[:, None] * z1[None, :]
        o_w = row * num_queries + o_m
        tl.store(p_weight + o_w, weight, mask=m_m)
        tl.store(p_gain + o_w, gain, mask=m_m)
    store_tile(p_dq, o_dq, m_m, 0, feature_grad(q0, t0, FEATURE), D, D0)
    if D1 > 0:
        store_tile(p_dq, o_dq, m_m, D0, feature_grad(q1, t1, FEATURE), D, D1)


@triton.jit(do_not_specialize=["num_keys", "rows", "heads", "k_sb", "v_sb", "dk_sb", "dv_sb"])
def _linear_attention_bwd_dkv_kernel(
    p_k, p_v, p_dk, p_dv, p_dstate, p_dkey_row, p_dvalue_row, p_key_row, p_value_row,
    num_keys, rows, heads,
    k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, dk_sb, dk_sn, dk_sh, dv_sb, dv_sn, dv_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dk and dv from dS. Grid (B * H * tiles): a program writes one tile of keys and values."""
    CENTRED: tl.constexpr = NORMALIZER == "covariance"
    row = tl.program_id(0) % rows
    tile = tl.program_id(0) // rows
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    row = row.to(tl.int64)
    o_n = tile * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < num_keys
    o_k = o_n.to(tl.int64) * (k_sn * VECTOR)
    o_v = o_n.to(tl.int64) * (v_sn * VECTOR)
    o_dk = o_n.to(tl.int64) * (dk_sn * VECTOR)
    o_dv = o_n.to(tl.int64) * (dv_sn * VECTOR)
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR
    p_dk += (batch * dk_sb + head * dk_sh) * VECTOR
    p_dv += (batch * dv_sb + head * dv_sh) * VECTOR
    p_dstate += row * D * E
    dk0, dk1, _ = rows_times_state(
        p_v, p_dstate, p_value_row + row * E, p_v, o_v, m_n, 1, E,
        E, D, D0, D1, "identity", CENTRED, False, WIDE, BLOCK, BLOCK_R,
    )  # fmt: skip
    if NORMALIZER == "ratio":
        dk0 += load_vector(p_dkey_row + row * D, 0, D, D0)[None, :]
    k0 = load_tile(p_k, o_k, m_n, 0, D, D0)
    store_tile(p_dk, o_dk, m_n, 0, feature_grad(k0, dk0, FEATURE), D, D0)
    if D1 > 0:
        if NORMALIZER == "ratio":
            dk1 += load_vector(p_dkey_row + row * D, D0, D, D1)[None, :]
        k1 = load_tile(p_k, o_k, m_n, D0, D, D1)
        store_tile(p_dk, o_dk, m_n, D0, feature_grad(k1, dk1, FEATURE), D, D1)
    dv0, dv1, _ = rows_times_state(
        p_k, p_dstate, p_key_row + row * D, p_k, o_k, m_n, E, 1,
        D, E, E0, E1, FEATURE, CENTRED, False, WIDE, BLOCK, BLOCK_R,
    )  # fmt: skip
    if CENTRED:
        dv0 += load_vector(p_dvalue_row + row * E, 0, E, E0)[None, :]
    store_tile(p_dv, o_dv, m_n, 0, dv0, E, E0)
    if E1 > 0:
        if CENTRED:
            dv1 += load_vector(p_dvalue_row + row * E, E0, E, E1)[None, :]
        store_tile(p_dv, o_dv, m_n, E0, dv1, E, E1)


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "heads", "do_sb", "q_sb", "k_sb", "v_sb", "dq_sb", "dk_sb", "dv_sb",
    ]
)  # fmt: skip
def _linear_attention_bwd_fused_kernel(
    p_do, p_q, p_k, p_v, p_dq, p_dk, p_dv, num_queries, num_keys, heads, scale, eps,
    do_sb, do_sn, do_sh, q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh,
    dq_sb, dq_sn, dq_sh, dk_sb, dk_sn, dk_sh, dv_sb, dv_sn, dv_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All three gradients. Grid (B * H): a program sums the state of its head, sweeps the queries
    for dq and dS, then the keys for dk and dv."""
    RATIO: tl.constexpr = NORMALIZER == "ratio"
    CENTRED: tl.constexpr = NORMALIZER == "covariance"
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_q.dtype.element_ty
    PRECISION: tl.constexpr = "tf32" if WIDE else "ieee"
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    p_do += (batch * do_sb + head * do_sh) * VECTOR
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR
    p_dq += (batch * dq_sb + head * dq_sh) * VECTOR
    p_dk += (batch * dk_sb + head * dk_sh) * VECTOR
    p_dv += (batch * dv_sb + head * dv_sh) * VECTOR

    ck0, ck1, cv0, cv1 = 0.0, 0.0, 0.0, 0.0
    if CENTRED:
        ck0 = shift_of(p_k, k_sn * VECTOR, num_keys, 0, D, D0, FEATURE)
        cv0 = shift_of(p_v, v_sn * VECTOR, num_keys, 0, E, E0, "identity")
        if D1 > 0:
            ck1 = shift_of(p_k, k_sn * VECTOR, num_keys, D0, D, D1, FEATURE)
        if E1 > 0:
            cv1 = shift_of(p_v, v_sn * VECTOR, num_keys, E0, E, E1, "identity")
    s00, s01, s10, s11, z0, z1, a0, a1 = moments(
        p_k, p_v, p_k, p_k, k_sn * VECTOR, v_sn * VECTOR, 0, 0, num_keys, ck0, ck1, cv0, cv1,
        D, D0, D1, E, E0, E1, FEATURE, CENTRED, False,
        RATIO or CENTRED, CENTRED, WIDE, BLOCK,
    )  # fmt: skip
    # Factor of the constant weights of covariance and none; ratio weighs each query.
    factor = scale
    if RATIO or CENTRED:
        z0 = tl.sum(z0, 1)
        if D1 > 0:
            z1 = tl.sum(z1, 1)
    if CENTRED:
        factor = scale / num_keys
        # From sums of differences to the means; S loses what the shift left of them.
        a0 = tl.sum(a0, 1) / num_keys
        s00 -= z0[:, None] * a0[None, :]
        cv0 += a0
        if D1 > 0:
            s10 -= z1[:, None] * a0[None, :]
        if E1 > 0:
            a1 = tl.sum(a1, 1) / num_keys
            s01 -= z0[:, None] * a1[None, :]
            cv1 += a1
            if D1 > 0:
                s11 -= z1[:, None] * a1[None, :]
        ck0 += z0 / num_keys
        if D1 > 0:
            ck1 += z1 / num_keys
    r00 = tl.trans(s00.to(DTYPE))
    r01, r10, r11 = 0.0, 0.0, 0.0
    if D1 > 0:
        r10 = tl.trans(s10.to(DTYPE))
    if E1 > 0:
        r01 = tl.trans(s01.to(DTYPE))
        if D1 > 0:
            r11 = tl.trans(s11.to(DTYPE))

    d00, d01, d10, d11, dz0, dz1, b0, b1 = empty_moments(D0, D1, E0, E1, RATIO, CENTRED)
    for m in range(0, num_queries, BLOCK):
        o_m = m + tl.arange(0, BLOCK)
        m_m = o_m < num_queries
        o_do = o_m.to(tl.int64) * (do_sn * VECTOR)
        o_q = o_m.to(tl.int64) * (q_sn * VECTOR)
        o_dq = o_m.to(tl.int64) * (dq_sn * VECTOR)
        q1, f1, g1, t1, gain = 0.0, 0.0, 0.0, 0.0, 0.0
        q0 = load_tile(p_q, o_q, m_m, 0, D, D0)
        f0 = load_features(p_q, o_q, m_m, 0, D, D0, FEATURE)
        g0 = load_tile(p_do, o_do, m_m, 0, E, E0)
        if D1 > 0:
            q1 = load_tile(p_q, o_q, m_m, D0, D, D1)
            f1 = load_features(p_q, o_q, m_m, D0, D, D1, FEATURE)
        if E1 > 0:
            g1 = load_tile(p_do, o_do, m_m, E0, E, E1)
        c0 = g0.to(DTYPE)
        c1 = 0.0
        if E1 > 0:
            c1 = g1.to(DTYPE)
        t0 = rows_times(c0, c1, r00, r01, E1, PRECISION)
        if D1 > 0:
            t1 = rows_times(c0, c1, r10, r11, E1, PRECISION)
        if RATIO:
            weight = scale / (scale * rows_dot_vector(f0, f1, z0, z1, D1) + eps)
            # In this order: the square of the weight of an all-zero query would overflow.
            gain = -(weight * row_dot(f0, f1, t0, t1, D1)) * weight
            gain = tl.where(m_m, gain, 0.0)
            t0 = t0 * weight[:, None] + gain[:, None] * z0[None, :]
            c0 = (g0.to(tl.float32) * weight[:, None]).to(DTYPE)
            if D1 > 0:
                t1 = t1 * weight[:, None] + gain[:, None] * z1[None, :]
            if E1 > 0:
                c1 = (g1.to(tl.float32) * weight[:, None]).to(DTYPE)
        else:
            t0 *= factor
            if D1 > 0:
                t1 *= factor
        store_tile(p_dq, o_dq, m_m, 0, feature_grad(q0, t0, FEATURE), D, D0)
        f0 = f0.to(DTYPE)
        if D1 > 0:
            store_tile(p_dq, o_dq, m_m, D0, feature_grad(q1, t1, FEATURE), D, D1)
            f1 = f1.to(DTYPE)
        columns = gain_columns(m_m, gain, RATIO, DTYPE, BLOCK)
        d00, d01, d10, d11, dz0, dz1, b0, b1 = moment_step(
            f0, f1, c0, c1, columns, d00, d01, d10, d11, dz0, dz1, b0, b1,
            D1, E1, RATIO, CENTRED, PRECISION,
        )  # fmt: skip
    if RATIO:
        factor = 1.0
        dz0 = tl.sum(dz0, 1)
        if D1 > 0:
            dz1 = tl.sum(dz1, 1)
    if CENTRED:
        b0 = tl.sum(b0, 1) / num_keys
        if E1 > 0:
            b1 = tl.sum(b1, 1) / num_keys
    d00 = (d00 * factor).to(DTYPE)
    if D1 > 0:
        d10 = (d10 * factor).to(DTYPE)
    if E1 > 0:
        d01 = (d01 * factor).to(DTYPE)
        if D1 > 0:
            d11 = (d11 * factor).to(DTYPE)

    for n in range(0, num_keys, BLOCK):
        o_n = n + tl.arange(0, BLOCK)
        m_n = o_n < num_keys
        o_k = o_n.to(tl.int64) * (k_sn * VECTOR)
        o_v = o_n.to(tl.int64) * (v_sn * VECTOR)
        o_dk = o_n.to(tl.int64) * (dk_sn * VECTOR)
        o_dv = o_n.to(tl.int64) * (dv_sn * VECTOR)
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
            v0 = v0.to(tl.float32) - cv0[None, :]
            if D1 > 0:
                f1 = f1.to(tl.float32) - ck1[None, :]
            if E1 > 0:
                v1 = v1.to(tl.float32) - cv1[None, :]
        f0, v0 = f0.to(DTYPE), v0.to(DTYPE)
        if D1 > 0:
            f1 = f1.to(DTYPE)
        if E1 > 0:
            v1 = v1.to(DTYPE)
        dk0 = rows_times(v0, v1, tl.trans(d00), transposed(d01, E1), E1, PRECISION)
        dv0 = rows_times(f0, f1, d00, d10, D1, PRECISION)
        if RATIO:
            dk0 += dz0[None, :]
        if CENTRED:
            dv0 += b0[None, :]
        store_tile(p_dk, o_dk, m_n, 0, feature_grad(k0, dk0, FEATURE), D, D0)
        store_tile(p_dv, o_dv, m_n, 0, dv0, E, E0)
        if D1 > 0:
            dk1 = rows_times(v0, v1, tl.trans(d10), transposed(d11, E1), E1, PRECISION)
            if RATIO:
                dk1 += dz1[None, :]
            store_tile(p_dk, o_dk, m_n, D0, feature_grad(k1, dk1, FEATURE), D, D1)
        if E1 > 0:
            dv1 = rows_times(f0, f1, d01, d11, D1, PRECISION)
            if CENTRED:
                dv1 += b1[None, :]
            store_tile(p_dv, o_dv, m_n, E0, dv1, E, E1)


@triton.jit
def transposed(x, WIDTH: tl.constexpr):
    """The transpose of a block of the state; an absent one is a scalar and stays."""
    y = x
    if WIDTH > 0:
        y = tl.trans(x)
    return y


def _fused(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, grads: tuple[Tensor, ...],
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> None:  # fmt: skip
    batch, num_queries, heads, head_dim = query.shape
    value_dim = value.shape[3]
    launch = configs.launch_of("bwd_fused", query, max(head_dim, value_dim))
    d0, d1 = configs.parts_of(head_dim)
    e0, e1 = configs.parts_of(value_dim)
    tensors = (d_out, query, key, value, *grads)
    vector = common_vector(*tensors)
    _linear_attention_bwd_fused_kernel[(batch * heads,)](
        *tensors, num_queries, key.shape[1], heads, scale, eps,
        *strides_in_vectors(vector, *tensors),
        D=head_dim, D0=d0, D1=d1, E=value_dim, E0=e0, E1=e1,
        FEATURE=feature_map, NORMALIZER=normalizer, WIDE=query.dtype == torch.float16,
        VECTOR=vector, BLOCK=launch.block, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def _query_side(
    d_out: Tensor, query: Tensor, dq: Tensor, state: State, num_keys: int,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> State:  # fmt: skip
    """Writes dq, returns dS with its rows: dz for ratio, sum_i do_i / N for covariance."""
    batch, num_queries, heads, head_dim = query.shape
    value_dim = d_out.shape[3]
    rows = batch * heads
    launch = configs.launch_of("bwd_dq", query, max(head_dim, value_dim))
    d0, d1 = configs.parts_of(head_dim)
    ratio = normalizer == "ratio"
    weight, gain = (
        empty(rows, num_queries if ratio else 0, like=query, dtype=torch.float32) for _ in range(2)
    )
    vector = common_vector(d_out, query, dq)
    _linear_attention_bwd_dq_kernel[(rows * triton.cdiv(num_queries, launch.block),)](
        d_out, query, dq, state.matrix, state.key_row, weight, gain,
        num_queries, rows, heads, scale, eps, *strides_in_vectors(vector, d_out, query, dq),
        D=head_dim, D0=d0, D1=d1, E=value_dim,
        FEATURE=feature_map, NORMALIZER=normalizer, WIDE=query.dtype == torch.float16,
        VECTOR=vector, BLOCK=launch.block, BLOCK_R=launch.step,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    factor = {"ratio": 1.0, "none": scale, "covariance": scale / num_keys}[normalizer]
    return sweep(
        query, d_out, weight, gain, factor=factor, count=num_keys, feature_map=feature_map,
        centred=False, weighted=ratio, sum_k=ratio, sum_v=normalizer == "covariance",
    )  # fmt: skip


def _key_side(
    key: Tensor, value: Tensor, dk: Tensor, dv: Tensor, d_state: State, state: State,
    feature_map: str, normalizer: str,
) -> None:  # fmt: skip
    batch, num_keys, heads, head_dim = key.shape
    value_dim = value.shape[3]
    rows = batch * heads
    launch = configs.launch_of("bwd_dkv", key, max(head_dim, value_dim))
    d0, d1 = configs.parts_of(head_dim)
    e0, e1 = configs.parts_of(value_dim)
    tensors = (key, value, dk, dv)
    vector = common_vector(*tensors)
    _linear_attention_bwd_dkv_kernel[(rows * triton.cdiv(num_keys, launch.block),)](
        *tensors, *d_state, state.key_row, state.value_row, num_keys, rows, heads,
        *strides_in_vectors(vector, *tensors),
        D=head_dim, D0=d0, D1=d1, E=value_dim, E0=e0, E1=e1,
        FEATURE=feature_map, NORMALIZER=normalizer, WIDE=key.dtype == torch.float16,
        VECTOR=vector, BLOCK=launch.block, BLOCK_R=launch.step,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def linear_attention_bwd(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, each contiguous."""
    dq, dk, dv = (empty(*x.shape, like=x) for x in (query, key, value))
    if 0 in (*query.shape, *value.shape):
        return dq.zero_(), dk.zero_(), dv.zero_()
    d_out, query, key, value = (unit_last(x) for x in (d_out, query, key, value))
    options = (feature_map, normalizer, scale, eps)
    with device_guard(query):
        if configs.runs_in_one_launch("bwd", query, key, value):
            _fused(d_out, query, key, value, (dq, dk, dv), *options)
        else:
            state = forward_state(key, value, feature_map, normalizer, scale)
            d_state = _query_side(d_out, query, dq, state, key.shape[1], *options)
            _key_side(key, value, dk, dv, d_state, state, feature_map, normalizer)
    return dq, dk, dv
