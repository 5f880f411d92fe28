"""Forward kernels of linear attention and their launchers.

Two ways, which `configs.py` chooses between: one launch in which a program owns the state of one
head, or three: partial states over ranges of tokens, their ordered sum, the queries.
"""

from typing import NamedTuple

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
    load_features,
    load_vector,
    moments,
    rows_dot_vector,
    rows_times,
    rows_times_state,
    shift_of,
    store_tile,
    store_vector,
)

_UNSPECIALIZED = ["num_queries", "num_keys", "heads", "q_sb", "k_sb", "v_sb", "o_sb"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _linear_attention_fwd_fused_kernel(
    p_q, p_k, p_v, p_o, num_queries, num_keys, heads, scale, eps,
    q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, o_sb, o_sn, o_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """o_i = g_i phi(q_i) S + b. Grid (B * H): a program sums the state of its head over all keys
    in registers, then writes all its queries."""
    RATIO: tl.constexpr = NORMALIZER == "ratio"
    COVARIANCE: tl.constexpr = NORMALIZER == "covariance"
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_q.dtype.element_ty
    PRECISION: tl.constexpr = "tf32" if WIDE else "ieee"
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR
    p_o += (batch * o_sb + head * o_sh) * VECTOR

    ck0, ck1, cv0, cv1 = 0.0, 0.0, 0.0, 0.0
    if COVARIANCE:
        ck0 = shift_of(p_k, k_sn * VECTOR, num_keys, 0, D, D0, FEATURE)
        cv0 = shift_of(p_v, v_sn * VECTOR, num_keys, 0, E, E0, "identity")
        if D1 > 0:
            ck1 = shift_of(p_k, k_sn * VECTOR, num_keys, D0, D, D1, FEATURE)
        if E1 > 0:
            cv1 = shift_of(p_v, v_sn * VECTOR, num_keys, E0, E, E1, "identity")
    s00, s01, s10, s11, z0, z1, a0, a1 = moments(
        p_k, p_v, p_k, p_k, k_sn * VECTOR, v_sn * VECTOR, 0, 0, num_keys, ck0, ck1, cv0, cv1,
        D, D0, D1, E, E0, E1, FEATURE, COVARIANCE, False,
        RATIO or COVARIANCE, COVARIANCE, WIDE, BLOCK,
    )  # fmt: skip
    if RATIO or COVARIANCE:
        z0 = tl.sum(z0, 1)
        if D1 > 0:
            z1 = tl.sum(z1, 1)
    if COVARIANCE:
        a0 = tl.sum(a0, 1)
        s00 -= z0[:, None] * (a0 / num_keys)[None, :]
        if D1 > 0:
            s10 -= z1[:, None] * (a0 / num_keys)[None, :]
        if E1 > 0:
            a1 = tl.sum(a1, 1)
            s01 -= z0[:, None] * (a1 / num_keys)[None, :]
            if D1 > 0:
                s11 -= z1[:, None] * (a1 / num_keys)[None, :]
    s00 = s00.to(DTYPE)
    if D1 > 0:
        s10 = s10.to(DTYPE)
    if E1 > 0:
        s01 = s01.to(DTYPE)
        if D1 > 0:
            s11 = s11.to(DTYPE)

    gain = scale
    if COVARIANCE:
        gain = scale / num_keys
    for m in range(0, num_queries, BLOCK):
        o_m = m + tl.arange(0, BLOCK)
        m_m = o_m < num_queries
        o_q = o_m.to(tl.int64) * (q_sn * VECTOR)
        o_o = o_m.to(tl.int64) * (o_sn * VECTOR)
        q1 = 0.0
        q0 = load_features(p_q, o_q, m_m, 0, D, D0, FEATURE)
        if D1 > 0:
            q1 = load_features(p_q, o_q, m_m, D0, D, D1, FEATURE)
        gains = tl.full((BLOCK,), 1.0, tl.float32) * gain
        if RATIO:
            gains = scale / (scale * rows_dot_vector(q0, q1, z0, z1, D1) + eps)
        q0 = q0.to(DTYPE)
        if D1 > 0:
            q1 = q1.to(DTYPE)
        o0 = rows_times(q0, q1, s00, s10, D1, PRECISION) * gains[:, None]
        if COVARIANCE:
            o0 += (cv0 + a0 / num_keys)[None, :]
        store_tile(p_o, o_o, m_m, 0, o0, E, E0)
        if E1 > 0:
            o1 = rows_times(q0, q1, s01, s11, D1, PRECISION) * gains[:, None]
            if COVARIANCE:
                o1 += (cv1 + a1 / num_keys)[None, :]
            store_tile(p_o, o_o, m_m, E0, o1, E, E1)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_split", "heads", "k_sb", "v_sb"])
def _linear_attention_fwd_moments_kernel(
    p_k, p_v, p_weight, p_gain, p_s, p_z, p_a, p_ck, p_cv,
    num_tokens, tokens_per_split, heads, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, EB: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, CENTRED: tl.constexpr, WEIGHTED: tl.constexpr,
    SUM_K: tl.constexpr, SUM_V: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial moments. Grid (B * H * blocks of EB value columns, splits): a program sums its range
    of tokens; the first split of a head also writes the shifts, its first block z."""
    BLOCKS: tl.constexpr = (E + EB - 1) // EB
    row = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    split = tl.program_id(1)
    rows = tl.num_programs(0) // BLOCKS
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    row = row.to(tl.int64)
    o_part = split.to(tl.int64) * rows + row
    columns = EB if E % EB == 0 else tl.minimum(EB, E - block * EB)
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR + block * EB
    p_weight += row * num_tokens
    p_gain += row * num_tokens
    p_s += o_part * D * E + block * EB
    p_z += o_part * D
    p_a += o_part * E + block * EB

    ck0, ck1, cv0, cv1 = 0.0, 0.0, 0.0, 0.0
    if CENTRED:
        p_ck += row * D
        p_cv += row * E + block * EB
        ck0 = shift_of(p_k, k_sn * VECTOR, num_tokens, 0, D, D0, FEATURE)
        cv0 = shift_of(p_v, v_sn * VECTOR, num_tokens, 0, columns, E0, "identity")
        if D1 > 0:
            ck1 = shift_of(p_k, k_sn * VECTOR, num_tokens, D0, D, D1, FEATURE)
        if E1 > 0:
            cv1 = shift_of(p_v, v_sn * VECTOR, num_tokens, E0, columns, E1, "identity")
        if split == 0:
            store_vector(p_ck, 0, ck0, D, D0)
            store_vector(p_cv, 0, cv0, columns, E0)
            if D1 > 0:
                store_vector(p_ck, D0, ck1, D, D1)
            if E1 > 0:
                store_vector(p_cv, E0, cv1, columns, E1)

    start = split * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, num_tokens)
    s00, s01, s10, s11, z0, z1, a0, a1 = moments(
        p_k, p_v, p_weight, p_gain, k_sn * VECTOR, v_sn * VECTOR, 1, start, stop,
        ck0, ck1, cv0, cv1, D, D0, D1, columns, E0, E1, FEATURE, CENTRED, WEIGHTED,
        SUM_K, SUM_V, WIDE, BLOCK,
    )  # fmt: skip
    o_d0 = tl.arange(0, D0)
    store_tile(p_s, o_d0 * E, o_d0 < D, 0, s00, columns, E0)
    if E1 > 0:
        store_tile(p_s, o_d0 * E, o_d0 < D, E0, s01, columns, E1)
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)
        store_tile(p_s, o_d1 * E, o_d1 < D, 0, s10, columns, E0)
        if E1 > 0:
            store_tile(p_s, o_d1 * E, o_d1 < D, E0, s11, columns, E1)
    if SUM_K:
        if block == 0:
            store_vector(p_z, 0, tl.sum(z0, 1), D, D0)
            if D1 > 0:
                store_vector(p_z, D0, tl.sum(z1, 1), D, D1)
    if SUM_V:
        store_vector(p_a, 0, tl.sum(a0, 1), columns, E0)
        if E1 > 0:
            store_vector(p_a, E0, tl.sum(a1, 1), columns, E1)


@triton.jit
def sum_of_parts(p_x, splits, stride, o_x, m_x, PARTS: tl.constexpr):
    """Sum over the splits in a fixed order, PARTS loads in flight."""
    total = tl.zeros(o_x.shape, tl.float32)
    o_p = tl.arange(0, PARTS)
    for part in range(0, splits, PARTS):
        o_part = (part + o_p).to(tl.int64) * stride
        mask = (part + o_p < splits)[:, None] & m_x[None, :]
        total += tl.sum(tl.load(p_x + o_part[:, None] + o_x[None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["splits"])
def _linear_attention_fwd_reduce_kernel(
    p_s, p_z, p_a, p_ck, p_cv, p_state, p_key_row, p_value_row, splits, factor, count,
    D: tl.constexpr, E: tl.constexpr, CENTRED: tl.constexpr,
    SUM_K: tl.constexpr, SUM_V: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """state = factor (sum S - z a^T / count), one cast. Grid (B * H, blocks of the flat state);
    the first block also writes the rows z or mean(phi(k)) and mean(v)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    o_s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < D * E
    p_z += row * D
    p_a += row * E
    total = sum_of_parts(p_s + row * D * E, splits, rows * D * E, o_s, m_s, PARTS)
    if CENTRED:
        z = sum_of_parts(p_z, splits, rows * D, o_s // E, m_s, PARTS)
        a = sum_of_parts(p_a, splits, rows * E, o_s % E, m_s, PARTS)
        total -= z * a / count
    total = (total * factor).to(p_state.dtype.element_ty)
    tl.store(p_state + row * D * E + o_s, total, mask=m_s)
    if tl.program_id(1) == 0:
        if SUM_K:
            o_d = tl.arange(0, D_PAD)
            z = sum_of_parts(p_z, splits, rows * D, o_d, o_d < D, PARTS)
            if CENTRED:
                z = load_vector(p_ck + row * D, 0, D, D_PAD) + z / count
            store_vector(p_key_row + row * D, 0, z, D, D_PAD)
        if SUM_V:
            o_e = tl.arange(0, E_PAD)
            a = sum_of_parts(p_a, splits, rows * E, o_e, o_e < E, PARTS) / count
            if CENTRED:
                a += load_vector(p_cv + row * E, 0, E, E_PAD)
            store_vector(p_value_row + row * E, 0, a, E, E_PAD)


@triton.jit(do_not_specialize=["num_queries", "rows", "heads", "q_sb", "o_sb"])
def _linear_attention_fwd_apply_kernel(
    p_q, p_o, p_state, p_key_row, p_value_row, num_queries, rows, heads, scale, eps,
    q_sb, q_sn, q_sh, o_sb, o_sn, o_sh,
    D: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """o_i = g_i phi(q_i) state + b. Grid (B * H * tiles): a program writes one tile of queries."""
    RATIO: tl.constexpr = NORMALIZER == "ratio"
    row = tl.program_id(0) % rows
    tile = tl.program_id(0) // rows
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    row = row.to(tl.int64)
    o_m = tile * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < num_queries
    o_q = o_m.to(tl.int64) * (q_sn * VECTOR)
    o_o = o_m.to(tl.int64) * (o_sn * VECTOR)
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_o += (batch * o_sb + head * o_sh) * VECTOR
    o0, o1, z = rows_times_state(
        p_q, p_state + row * D * E, p_key_row, p_key_row + row * D, o_q, m_m, E, 1,
        D, E, E0, E1, FEATURE, False, RATIO, WIDE, BLOCK, BLOCK_R,
    )  # fmt: skip
    gains = tl.full((BLOCK,), 1.0, tl.float32)
    if RATIO:
        gains = scale / (scale * z + eps)
    if NORMALIZER == "none":
        gains *= scale
    o0 *= gains[:, None]
    if NORMALIZER == "covariance":
        o0 += load_vector(p_value_row + row * E, 0, E, E0)[None, :]
    store_tile(p_o, o_o, m_m, 0, o0, E, E0)
    if E1 > 0:
        o1 *= gains[:, None]
        if NORMALIZER == "covariance":
            o1 += load_vector(p_value_row + row * E, E0, E, E1)[None, :]
        store_tile(p_o, o_o, m_m, E0, o1, E, E1)


class State(NamedTuple):
    """What a sweep over tokens leaves of a head, (B * H, ...): D x E, D and E numbers."""

    matrix: Tensor
    key_row: Tensor
    value_row: Tensor


def sweep(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    gain: Tensor,
    *,
    factor: float,
    count: int,
    feature_map: str,
    centred: bool,
    weighted: bool,
    sum_k: bool,
    sum_v: bool,
) -> State:
    """State of (key, value) by partial moments and their ordered sum."""
    batch, tokens, heads, head_dim = key.shape
    value_dim = value.shape[3]
    rows = batch * heads
    launch = configs.launch_of("fwd_moments", key, head_dim)
    columns = configs.value_block(head_dim, value_dim, key.element_size())
    d0, d1 = configs.parts_of(head_dim)
    e0, e1 = configs.parts_of(columns)
    blocks = triton.cdiv(value_dim, columns)
    splits = configs.splits_of(tokens, rows * blocks, key, launch.block)
    share = triton.cdiv(triton.cdiv(tokens, splits), launch.block) * launch.block
    splits = triton.cdiv(tokens, share)
    vector = common_vector(key, value)
    float32 = torch.float32
    part_s = empty(splits, rows, head_dim, value_dim, like=key, dtype=float32)
    part_z = empty(splits, rows, head_dim, like=key, dtype=float32)
    part_a = empty(splits, rows, value_dim, like=key, dtype=float32)
    shift_k = empty(rows, head_dim, like=key, dtype=float32)
    shift_v = empty(rows, value_dim, like=key, dtype=float32)
    _linear_attention_fwd_moments_kernel[(rows * blocks, splits)](
        key, value, weight, gain, part_s, part_z, part_a, shift_k, shift_v,
        tokens, share, heads, *strides_in_vectors(vector, key, value),
        D=head_dim, D0=d0, D1=d1, E=value_dim, EB=columns, E0=e0, E1=e1,
        FEATURE=feature_map, CENTRED=centred, WEIGHTED=weighted, SUM_K=sum_k, SUM_V=sum_v,
        WIDE=key.dtype == torch.float16, VECTOR=vector, BLOCK=launch.block,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    state = State(
        empty(rows, head_dim, value_dim, like=key, dtype=configs.state_dtype(key.dtype)),
        empty(rows, head_dim, like=key, dtype=float32),
        empty(rows, value_dim, like=key, dtype=float32),
    )
    block = 512
    _linear_attention_fwd_reduce_kernel[(rows, triton.cdiv(head_dim * value_dim, block))](
        part_s, part_z, part_a, shift_k, shift_v, *state, splits, factor, float(count),
        D=head_dim, E=value_dim, CENTRED=centred, SUM_K=sum_k, SUM_V=sum_v,
        D_PAD=triton.next_power_of_2(head_dim), E_PAD=triton.next_power_of_2(value_dim),
        BLOCK=block, PARTS=8, num_warps=4,
    )  # fmt: skip
    return state


def forward_state(
    key: Tensor, value: Tensor, feature_map: str, normalizer: str, scale: float
) -> State:
    """The state that queries meet: S and z for ratio, s Cov and both means for covariance."""
    covariance = normalizer == "covariance"
    return sweep(
        key, value, key, key,
        factor=scale / key.shape[1] if covariance else 1.0, count=key.shape[1],
        feature_map=feature_map, centred=covariance, weighted=False,
        sum_k=normalizer != "none", sum_v=covariance,
    )  # fmt: skip


def _fused(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> None:  # fmt: skip
    batch, num_queries, heads, head_dim = query.shape
    value_dim = value.shape[3]
    launch = configs.launch_of("fwd_fused", query, max(head_dim, value_dim))
    d0, d1 = configs.parts_of(head_dim)
    e0, e1 = configs.parts_of(value_dim)
    vector = common_vector(query, key, value, out)
    _linear_attention_fwd_fused_kernel[(batch * heads,)](
        query, key, value, out, num_queries, key.shape[1], heads, scale, eps,
        *strides_in_vectors(vector, query, key, value, out),
        D=head_dim, D0=d0, D1=d1, E=value_dim, E0=e0, E1=e1,
        FEATURE=feature_map, NORMALIZER=normalizer, WIDE=query.dtype == torch.float16,
        VECTOR=vector, BLOCK=launch.block, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def _apply(
    query: Tensor, out: Tensor, state: State,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> None:  # fmt: skip
    batch, num_queries, heads, head_dim = query.shape
    value_dim = out.shape[3]
    rows = batch * heads
    launch = configs.launch_of("fwd_apply", query, max(head_dim, value_dim))
    e0, e1 = configs.parts_of(value_dim)
    vector = common_vector(query, out)
    _linear_attention_fwd_apply_kernel[(rows * triton.cdiv(num_queries, launch.block),)](
        query, out, *state, num_queries, rows, heads, scale, eps,
        *strides_in_vectors(vector, query, out),
        D=head_dim, E=value_dim, E0=e0, E1=e1,
        FEATURE=feature_map, NORMALIZER=normalizer, WIDE=query.dtype == torch.float16,
        VECTOR=vector, BLOCK=launch.block, BLOCK_R=launch.step,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def linear_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> Tensor:  # fmt: skip
    """The operation of `api.linear_attention` on tensors that `api` has checked."""
    batch, num_queries, heads, _ = query.shape
    value_dim = value.shape[3]
    out = empty(batch, num_queries, heads, value_dim, like=query)
    if 0 in (*query.shape, *value.shape):
        return out.zero_()
    query, key, value = (unit_last(x) for x in (query, key, value))
    with device_guard(query):
        if configs.runs_in_one_launch("fwd", query, key, value):
            _fused(query, key, value, out, feature_map, normalizer, scale, eps)
        else:
            state = forward_state(key, value, feature_map, normalizer, scale)
            _apply(query, out, state, feature_map, normalizer, scale, eps)
    return out
