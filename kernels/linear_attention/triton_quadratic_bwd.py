"""Backward pass of linear attention in the quadratic order: cheaper if tokens are few.

With a_ij = phi(q_i) . phi(k_j), p_ij = do_i . v_j, z = sum_j phi(k_j), t_i = sum_j p_ij phi(k_j),
w_i = s / (s phi(q_i) . z + eps) and c_i = w_i^2 phi(q_i) . t_i, which is w_i do_i . o_i:

ratio: dphi(q_i) = w_i t_i - c_i z, dphi(k_j) = sum_i (w_i p_ij - c_i) phi(q_i),
    dv_j = sum_i w_i a_ij do_i
none: the same with w_i = s and c_i = 0

so that each gradient is made of two products, as the output of the forward pass is. One sweep over
the keys gives dq, w and c; one over the queries dk and dv. p and a, in their final form, are
rounded to the dtype of the inputs for the second product. float16, whose values would have to be
shifted (`triton_bwd.py`), and a covariance take the linear order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div, common_vector, empty, strides_in_vectors
from .._common.plans import Plans
from . import configs
from .triton_blocks import (
    feature,
    feature_grad,
    load_features,
    load_tile,
    row_dot,
    rows_dot_vector,
    store_tile,
)


@triton.jit
def _products(x0, x1, y0, y1, SECOND: tl.constexpr):
    """x y^T of rows in two parts."""
    s = tl.dot(x0, tl.trans(y0), input_precision="ieee")
    if SECOND > 0:
        s = tl.dot(x1, tl.trans(y1), s, input_precision="ieee")
    return s


@triton.jit
def _add(s, y0, y1, sum0, sum1, SECOND: tl.constexpr):
    """sum + s y of rows in two parts."""
    sum0 = tl.dot(s, y0, sum0, input_precision="ieee")
    if SECOND > 0:
        sum1 = tl.dot(s, y1, sum1, input_precision="ieee")
    return sum0, sum1


@triton.jit
def _load_parts(p_x, o_row, m_row, COLUMNS, W0: tl.constexpr, W1: tl.constexpr):
    x1 = 0.0
    x0 = load_tile(p_x, o_row, m_row, 0, COLUMNS, W0)
    if W1 > 0:
        x1 = load_tile(p_x, o_row, m_row, W0, COLUMNS, W1)
    return x0, x1


@triton.jit
def _load_feature_parts(
    p_x, o_row, m_row, COLUMNS, W0: tl.constexpr, W1: tl.constexpr, FEATURE: tl.constexpr
):
    x1 = 0.0
    x0 = load_features(p_x, o_row, m_row, 0, COLUMNS, W0, FEATURE)
    if W1 > 0:
        x1 = load_features(p_x, o_row, m_row, W0, COLUMNS, W1, FEATURE)
    return x0, x1


@triton.jit
def _sum_tokens(x, m_n, FEATURE: tl.constexpr):
    """The sum over a tile of phi(k): tokens beyond the last are zero unless phi(0) is not."""
    x = x.to(tl.float32)
    if FEATURE == "elu1":
        x = tl.where(m_n[:, None], x, 0.0)
    return tl.sum(x, 0)


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "tiles", "heads", "scale", "eps",
        "do_sb", "q_sb", "k_sb", "v_sb", "dq_sb",
    ]
)  # fmt: skip
def _linear_attention_bwd_quadratic_queries_kernel(
    p_do, p_q, p_k, p_v, p_dq, p_w, p_c, num_queries, num_keys, tiles, heads, scale, eps,
    do_sb, do_sn, do_sh, q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, dq_sb, dq_sn, dq_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, RATIO: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dq, and for ratio w and c of (B * H, M). Grid (B * H * tiles): a program passes all keys,
    STEP at a time, by one tile of queries."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    row = tl.program_id(0) // tiles
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    p_do += (batch * do_sb + head * do_sh) * VECTOR
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR
    p_dq += (batch * dq_sb + head * dq_sh) * VECTOR
    o_m = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < num_queries
    g0, g1 = _load_parts(p_do, o_m.to(tl.int64) * (do_sn * VECTOR), m_m, E, E0, E1)
    t1, z0, z1 = 0.0, tl.zeros((D0,), tl.float32), 0.0
    t0 = tl.zeros((BLOCK, D0), tl.float32)
    if D1 > 0:
        t1 = tl.zeros((BLOCK, D1), tl.float32)
        z1 = tl.zeros((D1,), tl.float32)
    for n in range(0, num_keys, STEP):
        o_n = n + tl.arange(0, STEP)
        m_n = o_n < num_keys
        o_k = o_n.to(tl.int64) * (k_sn * VECTOR)
        v0, v1 = _load_parts(p_v, o_n.to(tl.int64) * (v_sn * VECTOR), m_n, E, E0, E1)
        k0, k1 = _load_feature_parts(p_k, o_k, m_n, D, D0, D1, FEATURE)
        p = _products(g0, g1, v0, v1, E1).to(DTYPE)
        t0, t1 = _add(p, k0, k1, t0, t1, D1)
        if RATIO:
            z0 += _sum_tokens(k0, m_n, FEATURE)
            if D1 > 0:
                z1 += _sum_tokens(k1, m_n, FEATURE)
    q0, q1 = _load_parts(p_q, o_m.to(tl.int64) * (q_sn * VECTOR), m_m, D, D0, D1)
    if RATIO:
        # Where phi(0) is not 0 the padding of the channels meets zeros of t and z.
        f0, f1 = feature(q0, FEATURE), 0.0
        if D1 > 0:
            f1 = feature(q1, FEATURE)
        total = rows_dot_vector(f0, f1, z0, z1, D1)
        w = tl.where(m_m, scale / (scale * total + eps), 0.0)
        c = w * (w * row_dot(f0, f1, t0, t1, D1))
        t0 = t0 * w[:, None] - c[:, None] * z0[None, :]
        if D1 > 0:
            t1 = t1 * w[:, None] - c[:, None] * z1[None, :]
        o_row = row.to(tl.int64) * num_queries + o_m
        tl.store(p_w + o_row, w, mask=m_m)
        tl.store(p_c + o_row, c, mask=m_m)
    else:
        t0 *= scale
        if D1 > 0:
            t1 *= scale
    o_dq = o_m.to(tl.int64) * (dq_sn * VECTOR)
    store_tile(p_dq, o_dq, m_m, 0, feature_grad(q0, t0, FEATURE), D, D0)
    if D1 > 0:
        store_tile(p_dq, o_dq, m_m, D0, feature_grad(q1, t1, FEATURE), D, D1)


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "tiles", "heads", "scale",
        "do_sb", "q_sb", "k_sb", "v_sb", "dk_sb", "dv_sb",
    ]
)  # fmt: skip
def _linear_attention_bwd_quadratic_keys_kernel(
    p_do, p_q, p_k, p_v, p_dk, p_dv, p_w, p_c, num_queries, num_keys, tiles, heads, scale,
    do_sb, do_sn, do_sh, q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh,
    dk_sb, dk_sn, dk_sh, dv_sb, dv_sn, dv_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, RATIO: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dk and dv. Grid (B * H * tiles): a program passes all queries, STEP at a time, by one tile of
    keys and values."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    row = tl.program_id(0) // tiles
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    p_do += (batch * do_sb + head * do_sh) * VECTOR
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR
    p_dk += (batch * dk_sb + head * dk_sh) * VECTOR
    p_dv += (batch * dv_sb + head * dv_sh) * VECTOR
    p_w += row.to(tl.int64) * num_queries
    p_c += row.to(tl.int64) * num_queries
    o_n = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < num_keys
    o_k = o_n.to(tl.int64) * (k_sn * VECTOR)
    k0, k1 = _load_feature_parts(p_k, o_k, m_n, D, D0, D1, FEATURE)
    v0, v1 = _load_parts(p_v, o_n.to(tl.int64) * (v_sn * VECTOR), m_n, E, E0, E1)
    dk1, dv1 = 0.0, 0.0
    dk0 = tl.zeros((BLOCK, D0), tl.float32)
    dv0 = tl.zeros((BLOCK, E0), tl.float32)
    if D1 > 0:
        dk1 = tl.zeros((BLOCK, D1), tl.float32)
    if E1 > 0:
        dv1 = tl.zeros((BLOCK, E1), tl.float32)
    for m in range(0, num_queries, STEP):
        o_m = m + tl.arange(0, STEP)
        m_m = o_m < num_queries
        o_q = o_m.to(tl.int64) * (q_sn * VECTOR)
        q0, q1 = _load_feature_parts(p_q, o_q, m_m, D, D0, D1, FEATURE)
        g0, g1 = _load_parts(p_do, o_m.to(tl.int64) * (do_sn * VECTOR), m_m, E, E0, E1)
        # Queries beyond the last have no gradient, and thus no part of either sum.
        a = _products(k0, k1, q0, q1, D1)
        p = _products(v0, v1, g0, g1, E1)
        if RATIO:
            w = tl.load(p_w + o_m, mask=m_m, other=0.0)
            c = tl.load(p_c + o_m, mask=m_m, other=0.0)
            a *= w[None, :]
            p = p * w[None, :] - c[None, :]
        dv0, dv1 = _add(a.to(DTYPE), g0, g1, dv0, dv1, E1)
        dk0, dk1 = _add(p.to(DTYPE), q0, q1, dk0, dk1, D1)
    if not RATIO:
        dk0 *= scale
        dv0 *= scale
        if D1 > 0:
            dk1 *= scale
        if E1 > 0:
            dv1 *= scale
    k0, k1 = _load_parts(p_k, o_k, m_n, D, D0, D1)
    o_dk = o_n.to(tl.int64) * (dk_sn * VECTOR)
    o_dv = o_n.to(tl.int64) * (dv_sn * VECTOR)
    store_tile(p_dk, o_dk, m_n, 0, feature_grad(k0, dk0, FEATURE), D, D0)
    store_tile(p_dv, o_dv, m_n, 0, dv0, E, E0)
    if D1 > 0:
        store_tile(p_dk, o_dk, m_n, D0, feature_grad(k1, dk1, FEATURE), D, D1)
    if E1 > 0:
        store_tile(p_dv, o_dv, m_n, E0, dv1, E, E1)


def _plan(
    tensors: tuple[Tensor, ...], feature_map: str, normalizer: str, scale: float, eps: float
) -> tuple[KernelCall, KernelCall]:
    """The launches for dq and for dk and dv."""
    d_out, query, key, value, dq, dk, dv = tensors
    batch, num_queries, heads, head_dim = query.shape
    num_keys, value_dim = key.shape[1], value.shape[3]
    vector = common_vector(*tensors)
    calls = []
    for name, kernel, tokens, grads, more in (
        ("queries", _linear_attention_bwd_quadratic_queries_kernel, num_queries, (dq,), (eps,)),
        ("keys", _linear_attention_bwd_quadratic_keys_kernel, num_keys, (dk, dv), ()),
    ):
        name = f"bwd_quadratic_{name}"
        launch = configs.launch_of(name, query, max(head_dim, value_dim))
        d0, d1 = configs.parts_of(head_dim, "d", name, query.dtype)
        e0, e1 = configs.parts_of(value_dim, "e", name, query.dtype)
        tiles = ceil_div(tokens, launch.block)
        strides = strides_in_vectors(vector, d_out, query, key, value, *grads)
        numbers = (num_queries, num_keys, tiles, heads, scale, *more, *strides)
        constants = {
            "D": head_dim, "D0": d0, "D1": d1, "E": value_dim, "E0": e0, "E1": e1,
            "FEATURE": configs.kernel_feature(feature_map, query), "RATIO": normalizer == "ratio",
            "VECTOR": vector, "BLOCK": launch.block, "STEP": launch.step,
            "num_warps": launch.warps, "num_stages": launch.stages,
        }  # fmt: skip
        calls.append(KernelCall(kernel, (batch * heads * tiles,), numbers, constants))
    return calls[0], calls[1]


_PLANS = Plans(_plan)


def backward_quadratic(
    inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...],
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> None:  # fmt: skip
    """Fills `grads`, those of query, key and value, from `inputs`: d_out, query, key and value. No
    covariance, no float16."""
    d_out, query, key, value = inputs
    options = (feature_map, normalizer, scale, eps)
    if configs.quadratic_kernel(query, key, value, d_out) == "hopper":
        from .hopper_quadratic_bwd import backward_quadratic_hopper  # Gluon is not in every triton

        backward_quadratic_hopper(inputs, grads, *options)
        return
    queries, keys = _PLANS((*inputs, *grads), *options)
    shape = (query.shape[0] * query.shape[2], query.shape[1])
    weights, offsets = (empty(*shape, like=query, dtype=torch.float32) for _ in "wc")
    queries(*inputs, grads[0], weights, offsets)
    keys(*inputs, *grads[1:], weights, offsets)
