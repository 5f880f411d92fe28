"""Backward kernels of linear attention for heads too wide for one program to keep a state.

Formulas: `triton_bwd.py`. The states stream past one tile of tokens, and the sums over queries are
the same sweep as those over keys, with a weight for each.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div, common_vector, empty, strides_in_vectors
from .._common.plans import Memo, Plans
from . import configs, ways
from .triton_blocks import (
    feature,
    feature_grad,
    load_tile,
    load_vector,
    row_dot,
    rows_dot_vector,
    rows_times_state,
    store_tile,
)
from .triton_state import State, forward_state, sweep


@triton.jit(
    do_not_specialize=["num_queries", "rows", "heads", "scale", "eps", "do_sb", "q_sb", "dq_sb"]
)
def _linear_attention_bwd_dq_wide_kernel(
    p_do, p_q, p_dq, p_state, p_key_row, p_value_row, p_weight, p_gain,
    num_queries, rows, heads, scale, eps,
    do_sb, do_sn, do_sh, q_sb, q_sn, q_sh, dq_sb, dq_sn, dq_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dq, and for ratio the weights w_i and gains -w_i u_i of the sums over queries. Grid
    (B * H * tiles): a program streams the state past one tile of queries."""
    SHIFTED: tl.constexpr = NORMALIZER == "ratio" and WIDE
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
    t0, t1, shift = rows_times_state(
        p_do, p_state + row * D * E, p_do, p_value_row + row * E, o_do, m_m, D, 1,
        E, D, D0, D1, "identity", False, SHIFTED, WIDE, BLOCK, BLOCK_R,
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
        inverse = 1.0 / (scale * rows_dot_vector(f0, f1, z0, z1, D1) + eps)
        weight = scale * inverse
        gain = -weight * row_dot(f0, f1, t0, t1, D1)
        if SHIFTED:
            gain += eps * inverse * shift
        t0 = (t0 + gain[:, None] * z0[None, :]) * weight[:, None]
        if D1 > 0:
            t1 = (t1 + gain[:, None] * z1[None, :]) * weight[:, None]
        o_w = row * num_queries + o_m
        tl.store(p_weight + o_w, weight, mask=m_m)
        tl.store(p_gain + o_w, gain, mask=m_m)
    store_tile(p_dq, o_dq, m_m, 0, feature_grad(q0, t0, FEATURE), D, D0)
    if D1 > 0:
        store_tile(p_dq, o_dq, m_m, D0, feature_grad(q1, t1, FEATURE), D, D1)


@triton.jit(do_not_specialize=["num_keys", "rows", "heads", "k_sb", "v_sb", "dk_sb", "dv_sb"])
def _linear_attention_bwd_dkv_wide_kernel(
    p_k, p_v, p_dk, p_dv, p_dstate, p_dkey_row, p_dvalue_row, p_key_row, p_value_row,
    num_keys, rows, heads,
    k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, dk_sb, dk_sn, dk_sh, dv_sb, dv_sn, dv_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dk and dv from dS. Grid (B * H * tiles): a program streams it past one tile of tokens."""
    CENTRED: tl.constexpr = NORMALIZER == "covariance"
    SHIFTED: tl.constexpr = CENTRED or (NORMALIZER == "ratio" and WIDE)
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
        p_v, p_dstate, p_value_row + row * E, p_v, o_v, m_n, D, 1,
        E, D, D0, D1, "identity", SHIFTED, False, WIDE, BLOCK, BLOCK_R,
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
        p_k, p_dstate, p_key_row + row * D, p_k, o_k, m_n, 1, D,
        D, E, E0, E1, FEATURE, CENTRED, False, WIDE, BLOCK, BLOCK_R,
    )  # fmt: skip
    if CENTRED:
        dv0 += load_vector(p_dvalue_row + row * E, 0, E, E0)[None, :]
    store_tile(p_dv, o_dv, m_n, 0, dv0, E, E0)
    if E1 > 0:
        if CENTRED:
            dv1 += load_vector(p_dvalue_row + row * E, E0, E, E1)[None, :]
        store_tile(p_dv, o_dv, m_n, E0, dv1, E, E1)


def _plan_queries(
    tensors: tuple[Tensor, Tensor, Tensor],
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> KernelCall:  # fmt: skip
    d_out, query, _ = tensors
    batch, num_queries, heads, head_dim = query.shape
    value_dim = d_out.shape[3]
    rows = batch * heads
    launch = configs.launch_of("bwd_dq_wide", query, max(head_dim, value_dim))
    d0, d1 = configs.parts_of(head_dim, "d", "bwd_wide", query.dtype)
    vector = common_vector(*tensors)
    numbers = (num_queries, rows, heads, scale, eps, *strides_in_vectors(vector, *tensors))
    constants = {
        "D": head_dim, "D0": d0, "D1": d1, "E": value_dim,
        "FEATURE": configs.kernel_feature(feature_map, query), "NORMALIZER": normalizer,
        "WIDE": query.dtype == torch.float16,
        "VECTOR": vector, "BLOCK": launch.block, "BLOCK_R": launch.step,
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip
    grid = (rows * ceil_div(num_queries, launch.block),)
    return KernelCall(_linear_attention_bwd_dq_wide_kernel, grid, numbers, constants)


_QUERY_PLANS = Plans(_plan_queries)


class Wide(NamedTuple):
    """Which kernels serve a layout of aligned tensors, and the plans of their launches."""

    query_kernel: str
    rows_kernel: str
    state: Memo
    queries: Memo
    sweep: Memo
    keys: Memo
    values: Memo


def wide_of(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, normalizer: str) -> Wide:
    """For these; gradients lie as memory that has just been allocated does."""
    query_kernel = rows_kernel = "general"
    if normalizer != "covariance":
        query_kernel = ways.query_grad_kernel(d_out, query)
        dk, dv = (x.new_empty(x.shape, device="meta") for x in (key, value))
        if ways.rows_kernel(key, dv) == ways.rows_kernel(value, dk) == "hopper":
            rows_kernel = "hopper"
    return Wide(query_kernel, rows_kernel, *(Memo() for _ in range(5)))


def _query_side(
    d_out: Tensor, query: Tensor, dq: Tensor, state: State, num_keys: int,
    feature_map: str, normalizer: str, scale: float, eps: float, wide: Wide,
) -> State:  # fmt: skip
    """Writes dq, returns dS with its rows: dz for ratio, sum_i do_i / N for covariance."""
    batch, num_queries, heads, _ = query.shape
    ratio = normalizer == "ratio"
    factor = {"ratio": 1.0, "none": scale, "covariance": scale / num_keys}[normalizer]
    settings = {"factor": factor, "count": num_keys, "centred": False, "shifted": False}
    if wide.query_kernel == "hopper":
        from .hopper_query_grad import query_grad_hopper  # Gluon is not in every triton

        x, dz = query_grad_hopper(
            d_out, query, dq, state.matrix, state.key_row,
            feature_map, ratio, scale, eps, wide.queries,
        )  # fmt: skip
        feature_map = "identity" if ratio else feature_map
        settings |= {"feature_map": feature_map, "weighted": False, "sum_k": False}
        summed = sweep(x, d_out, x, x, **settings, sum_v=False, memo=wide.sweep)
        return summed._replace(key_row=dz)
    weight, gain = (
        empty(batch * heads, num_queries if ratio else 0, like=query, dtype=torch.float32)
        for _ in range(2)
    )
    options = (feature_map, normalizer, scale, eps)
    call = _QUERY_PLANS((d_out, query, dq), *options, memo=wide.queries)
    call(d_out, query, dq, *state, weight, gain)
    settings |= {"feature_map": feature_map, "weighted": ratio, "sum_k": ratio}
    sum_v = normalizer == "covariance"
    return sweep(query, d_out, weight, gain, **settings, sum_v=sum_v, memo=wide.sweep)


def _plan_keys(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], feature_map: str, normalizer: str
) -> KernelCall:
    key, value, _, _ = tensors
    batch, num_keys, heads, head_dim = key.shape
    value_dim = value.shape[3]
    rows = batch * heads
    launch = configs.launch_of("bwd_dkv_wide", key, max(head_dim, value_dim))
    d0, d1 = configs.parts_of(head_dim, "d", "bwd_wide", key.dtype)
    e0, e1 = configs.parts_of(value_dim, "e", "bwd_wide", key.dtype)
    vector = common_vector(*tensors)
    constants = {
        "D": head_dim, "D0": d0, "D1": d1, "E": value_dim, "E0": e0, "E1": e1,
        "FEATURE": configs.kernel_feature(feature_map, key), "NORMALIZER": normalizer,
        "WIDE": key.dtype == torch.float16,
        "VECTOR": vector, "BLOCK": launch.block, "BLOCK_R": launch.step,
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip
    grid = (rows * ceil_div(num_keys, launch.block),)
    numbers = (num_keys, rows, heads, *strides_in_vectors(vector, *tensors))
    return KernelCall(_linear_attention_bwd_dkv_wide_kernel, grid, numbers, constants)


_KEY_PLANS = Plans(_plan_keys)


def _key_side(
    key: Tensor, value: Tensor, dk: Tensor, dv: Tensor, d_state: State, state: State,
    feature_map: str, normalizer: str, wide: Wide,
) -> None:  # fmt: skip
    """Writes dk and dv."""
    if wide.rows_kernel == "hopper":
        from .hopper_rows import rows_times_state_hopper  # Gluon is not in every triton

        state_rows, ratio = (d_state.matrix, d_state.key_row), normalizer == "ratio"
        rows_times_state_hopper(
            key, *state_rows, dv, key, "dv", feature_map, False, 1.0, 0.0, wide.values
        )
        rows_times_state_hopper(
            value, *state_rows, dk, key, "dk", feature_map, ratio, 1.0, 0.0, wide.keys
        )
        return
    tensors = (key, value, dk, dv)
    call = _KEY_PLANS(tensors, feature_map, normalizer, memo=wide.keys)
    call(*tensors, *d_state, state.key_row, state.value_row)


def backward_wide(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor, Tensor],
    feature_map: str, normalizer: str, scale: float, eps: float,
    wide: Wide | None, state: State | None,
) -> None:  # fmt: skip
    """Fills `grads` of query, key and value. `tensors` are d_out and these; without `wide` some of
    them are not aligned, without `state` it is computed."""
    d_out, query, key, value = tensors
    dq, dk, dv = grads
    wide = wide or wide_of(*tensors, normalizer)
    if state is None:
        shifted = normalizer == "ratio" and query.dtype == torch.float16
        state = forward_state(key, value, feature_map, normalizer, scale, shifted, wide.state)
    options = (feature_map, normalizer, scale, eps)
    d_state = _query_side(d_out, query, dq, state, key.shape[1], *options, wide)
    _key_side(key, value, dk, dv, d_state, state, feature_map, normalizer, wide)
