"""Linear attention in the quadratic order, (phi(q) phi(k)^T) v, for fewer keys than head channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.launch import common_vector, strides_in_vectors
from . import configs
from .triton_blocks import load_features, load_tile, store_tile


@triton.jit
def _means(
    p_k, p_v, k_stride, v_stride, num_keys,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Means of phi(k) and v over all keys, few as they are here."""
    k0, v0 = tl.zeros((D0,), tl.float32), tl.zeros((E0,), tl.float32)
    k1, v1 = 0.0, 0.0
    if D1 > 0:
        k1 = tl.zeros((D1,), tl.float32)
    if E1 > 0:
        v1 = tl.zeros((E1,), tl.float32)
    for n in range(0, num_keys, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < num_keys
        o_k = o_n.to(tl.int64) * k_stride
        o_v = o_n.to(tl.int64) * v_stride
        x = load_features(p_k, o_k, m_n, 0, D, D0, FEATURE).to(tl.float32)
        k0 += tl.sum(tl.where(m_n[:, None], x, 0.0), 0)
        v0 += tl.sum(load_tile(p_v, o_v, m_n, 0, E, E0).to(tl.float32), 0)
        if D1 > 0:
            x = load_features(p_k, o_k, m_n, D0, D, D1, FEATURE).to(tl.float32)
            k1 += tl.sum(tl.where(m_n[:, None], x, 0.0), 0)
        if E1 > 0:
            v1 += tl.sum(load_tile(p_v, o_v, m_n, E0, E, E1).to(tl.float32), 0)
    return k0 / num_keys, k1 / num_keys, v0 / num_keys, v1 / num_keys


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "tiles", "heads", "scale", "eps", "q_sb", "k_sb", "v_sb", "o_sb",
    ]
)  # fmt: skip
def _linear_attention_fwd_quadratic_kernel(
    p_q, p_k, p_v, p_o, num_queries, num_keys, tiles, heads, scale, eps,
    q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, o_sb, o_sn, o_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o_i = g_i sum_j (phi(q_i) . x_j) y_j + b, x = phi(k) and y = v, less their means for
    covariance. Grid (B * H * tiles): a program passes all keys by one tile of queries."""
    RATIO: tl.constexpr = NORMALIZER == "ratio"
    CENTRED: tl.constexpr = NORMALIZER == "covariance"
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_q.dtype.element_ty
    PRECISION: tl.constexpr = "tf32" if WIDE else "ieee"
    row = tl.program_id(0) // tiles
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR
    p_o += (batch * o_sb + head * o_sh) * VECTOR
    o_m = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < num_queries
    o_q = o_m.to(tl.int64) * (q_sn * VECTOR)
    q1 = 0.0
    q0 = load_features(p_q, o_q, m_m, 0, D, D0, FEATURE).to(DTYPE)
    if D1 > 0:
        q1 = load_features(p_q, o_q, m_m, D0, D, D1, FEATURE).to(DTYPE)
    ck0, ck1, cv0, cv1 = 0.0, 0.0, 0.0, 0.0
    if CENTRED:
        ck0, ck1, cv0, cv1 = _means(
            p_k, p_v, k_sn * VECTOR, v_sn * VECTOR, num_keys,
            D, D0, D1, E, E0, E1, FEATURE, BLOCK_N,
        )  # fmt: skip
        scale /= num_keys

    y0 = tl.zeros((BLOCK, E0), tl.float32)
    y1 = 0.0
    if E1 > 0:
        y1 = tl.zeros((BLOCK, E1), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(0, num_keys, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < num_keys
        o_k = o_n.to(tl.int64) * (k_sn * VECTOR)
        o_v = o_n.to(tl.int64) * (v_sn * VECTOR)
        k0 = load_features(p_k, o_k, m_n, 0, D, D0, FEATURE)
        if CENTRED:
            k0 = k0.to(tl.float32) - ck0[None, :]
        score = tl.dot(q0, tl.trans(k0.to(DTYPE)), input_precision=PRECISION)
        if D1 > 0:
            k1 = load_features(p_k, o_k, m_n, D0, D, D1, FEATURE)
            if CENTRED:
                k1 = k1.to(tl.float32) - ck1[None, :]
            score = tl.dot(q1, tl.trans(k1.to(DTYPE)), score, input_precision=PRECISION)
        # Keys beyond the last are not zero after the mean, nor where phi(0) is not.
        score = tl.where(m_n[None, :], score * scale, 0.0)
        if RATIO:
            total += tl.sum(score, 1)
        score = score.to(DTYPE)
        v0 = load_tile(p_v, o_v, m_n, 0, E, E0)
        if CENTRED:
            v0 = v0.to(tl.float32) - cv0[None, :]
        y0 = tl.dot(score, v0.to(DTYPE), y0, input_precision=PRECISION)
        if E1 > 0:
            v1 = load_tile(p_v, o_v, m_n, E0, E, E1)
            if CENTRED:
                v1 = v1.to(tl.float32) - cv1[None, :]
            y1 = tl.dot(score, v1.to(DTYPE), y1, input_precision=PRECISION)

    o_o = o_m.to(tl.int64) * (o_sn * VECTOR)
    if RATIO:
        y0 /= (total + eps)[:, None]
        if E1 > 0:
            y1 /= (total + eps)[:, None]
    if CENTRED:
        y0 += cv0[None, :]
        if E1 > 0:
            y1 += cv1[None, :]
    store_tile(p_o, o_o, m_m, 0, y0, E, E0)
    if E1 > 0:
        store_tile(p_o, o_o, m_m, E0, y1, E, E1)


def attend_quadratic(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> None:  # fmt: skip
    """Fills `out`."""
    batch, num_queries, heads, head_dim = query.shape
    value_dim = value.shape[3]
    launch = configs.launch_of("fwd_quadratic", query, max(head_dim, value_dim))
    d0, d1 = configs.parts_of(head_dim)
    e0, e1 = configs.parts_of(value_dim)
    vector = common_vector(query, key, value, out)
    tiles = triton.cdiv(num_queries, launch.block)
    _linear_attention_fwd_quadratic_kernel[(batch * heads * tiles,)](
        query, key, value, out, num_queries, key.shape[1], tiles, heads, scale, eps,
        *strides_in_vectors(vector, query, key, value, out),
        D=head_dim, D0=d0, D1=d1, E=value_dim, E0=e0, E1=e1,
        FEATURE=configs.kernel_feature(feature_map, query), NORMALIZER=normalizer,
        WIDE=query.dtype == torch.float16, VECTOR=vector,
        BLOCK=launch.block, BLOCK_N=launch.step,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
