"""Linear attention in the quadratic order, (phi(q) phi(k)^T) v: cheaper if keys are few.

As in softmax attention a program owns a tile of queries and passes the keys by it, but without
maxima: o_i = s y_i / (s sum_j a_ij + eps) with a_ij = phi(q_i) . phi(k_j) and y_i = sum_j a_ij v_j.
Scores are rounded to the dtype of the inputs for the second product; their sums are of float32.
A covariance would need the means of all keys first: it takes the linear order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import aligned, ceil_div, common_vector, strides_in_vectors
from .._common.plans import Memo, Plans
from . import configs, ways
from .triton_blocks import load_features, load_tile, store_tile


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
    FEATURE: tl.constexpr, RATIO: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * tiles): a program passes all keys, STEP at a time, by one tile of queries. The
    tiles of a head follow each other, so that its keys and values come from the L2 cache."""
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
    q1, y1 = 0.0, 0.0
    q0 = load_features(p_q, o_q, m_m, 0, D, D0, FEATURE).to(DTYPE)
    y0 = tl.zeros((BLOCK, E0), tl.float32)
    if D1 > 0:
        q1 = load_features(p_q, o_q, m_m, D0, D, D1, FEATURE).to(DTYPE)
    if E1 > 0:
        y1 = tl.zeros((BLOCK, E1), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(0, num_keys, STEP):
        k1, v1 = 0.0, 0.0
        o_n = n + tl.arange(0, STEP)
        m_n = o_n < num_keys
        o_k = o_n.to(tl.int64) * (k_sn * VECTOR)
        o_v = o_n.to(tl.int64) * (v_sn * VECTOR)
        k0 = load_features(p_k, o_k, m_n, 0, D, D0, FEATURE).to(DTYPE)
        if D1 > 0:
            k1 = load_features(p_k, o_k, m_n, D0, D, D1, FEATURE).to(DTYPE)
        v0 = load_tile(p_v, o_v, m_n, 0, E, E0).to(DTYPE)
        if E1 > 0:
            v1 = load_tile(p_v, o_v, m_n, E0, E, E1).to(DTYPE)
        score = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            score = tl.dot(q1, tl.trans(k1), score, input_precision=PRECISION)
        if RATIO:
            if FEATURE == "elu1":
                # Keys beyond the last are zero elsewhere: phi(0) = 0.
                score = tl.where(m_n[None, :], score, 0.0)
            total += tl.sum(score, 1)
        score = score.to(DTYPE)
        y0 = tl.dot(score, v0, y0, input_precision=PRECISION)
        if E1 > 0:
            y1 = tl.dot(score, v1, y1, input_precision=PRECISION)
    gains = tl.full((BLOCK,), 1.0, tl.float32) * scale
    if RATIO:
        gains = scale / (scale * total + eps)
    o_o = o_m.to(tl.int64) * (o_sn * VECTOR)
    store_tile(p_o, o_o, m_m, 0, y0 * gains[:, None], E, E0)
    if E1 > 0:
        store_tile(p_o, o_o, m_m, E0, y1 * gains[:, None], E, E1)


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    feature_map: str, normalizer: str, scale: float, eps: float, are_aligned: bool,
) -> KernelCall:  # fmt: skip
    """`are_aligned` only tells plans apart: `ways.quadratic_kernel` asks it, no layout tells."""
    query, key, value, _ = tensors
    if ways.quadratic_kernel(query, key, value) == "hopper":
        from .hopper_quadratic import plan_quadratic_hopper  # Gluon is not in every triton

        return plan_quadratic_hopper(tensors, feature_map, normalizer, scale, eps)
    batch, num_queries, heads, head_dim = query.shape
    value_dim = value.shape[3]
    launch = configs.launch_of("fwd_quadratic", query, max(head_dim, value_dim))
    d0, d1 = configs.parts_of(head_dim, "d", "fwd_quadratic", query.dtype)
    e0, e1 = configs.parts_of(value_dim, "e", "fwd_quadratic", query.dtype)
    vector = common_vector(*tensors)
    tiles = ceil_div(num_queries, launch.block)
    numbers = (
        num_queries, key.shape[1], tiles, heads, scale, eps, *strides_in_vectors(vector, *tensors),
    )  # fmt: skip
    constants = {
        "D": head_dim, "D0": d0, "D1": d1, "E": value_dim, "E0": e0, "E1": e1,
        "FEATURE": configs.kernel_feature(feature_map, query), "RATIO": normalizer == "ratio",
        "WIDE": query.dtype == torch.float16, "VECTOR": vector,
        "BLOCK": launch.block, "STEP": launch.step,
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip
    grid = (batch * heads * tiles,)
    return KernelCall(_linear_attention_fwd_quadratic_kernel, grid, numbers, constants)


_PLANS = Plans(_plan)


def attend_quadratic(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float, memo: Memo | None = None,
) -> None:  # fmt: skip
    """Fills `out`; no covariance. A `memo` is for tensors that begin at boundaries."""
    tensors = (query, key, value, out)
    options = (feature_map, normalizer, scale, eps, memo is not None or aligned(query, key, value))
    _PLANS(tensors, *options, memo=memo)(*tensors)
