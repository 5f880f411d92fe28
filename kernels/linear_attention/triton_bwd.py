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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import (
    aligned,
    common_vector,
    device_guard,
    empty,
    strides_in_vectors,
    unit_last,
)
from .._common.plans import Memo, Plans
from . import configs, ways
from .triton_blocks import (
    centre,
    folds,
    load_state,
    load_vectors,
    moments,
    scale_cast,
    shifts_of,
    store_state,
    store_vectors,
    value_shifts_of,
)
from .triton_bwd_sweeps import key_sweep, query_sweep
from .triton_bwd_wide import Wide, backward_wide, wide_of
from .triton_keys_first import moments_keys_first, query_sweep_keys_first
from .triton_state import State, empty_parts, forward_state, reduce_parts


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
        d00, d01, d10, d11, dz0, dz1, b0, b1 = query_sweep(
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
    key_sweep(
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
        d00, d01, d10, d11, dz0, dz1, b0, b1 = query_sweep(
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
    key_sweep(
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


class _Plan(NamedTuple):
    """The way that runs, the launch that is all of the fused one, and what the wide and the
    quadratic one know of aligned tensors."""

    way: str
    fused: KernelCall | None = None
    wide: Wide | None = None
    quadratic: Memo | None = None


def _plan(
    tensors: tuple[Tensor, ...],
    feature_map: str, normalizer: str, scale: float, eps: float, are_aligned: tuple[bool, bool],
) -> _Plan:  # fmt: skip
    """`are_aligned`: d_out, and all the others; `ways` asks it too, and no layout tells."""
    _, query, key, value = tensors
    way = ways.way_of("bwd", query, key, value, normalizer)
    if way != "fused":
        if not all(are_aligned):
            return _Plan(way)
        wide = wide_of(*tensors, normalizer) if way == "wide" else None
        return _Plan(way, wide=wide, quadratic=Memo() if way == "quadratic" else None)
    launch = configs.launch_of("bwd_fused", query, max(query.shape[3], value.shape[3]))
    grads = [x.new_empty(x.shape, device="meta") for x in (query, key, value)]
    vector = common_vector(*tensors, *grads)
    strides = strides_in_vectors(vector, *tensors, *grads)
    batch, num_queries, heads, _ = query.shape
    numbers = (num_queries, key.shape[1], heads, scale, eps, *strides)
    constants = _constants("bwd_fused", launch, vector, query, value, feature_map, normalizer)
    constants["KEYS_FIRST"] = _keys_first("bwd_fused", query, value, normalizer)
    call = KernelCall(_linear_attention_bwd_fused_kernel, (batch * heads,), numbers, constants)
    return _Plan(way, call)


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
    tensors = (d_out, query, key, value)
    with device_guard(query):
        plan = _PLANS(tensors, *options, (aligned(d_out), aligned(query, key, value)))
        if plan.fused is not None:
            plan.fused(*tensors, dq, dk, dv)
            return dq, dk, dv
        if plan.way == "quadratic":
            from .hopper_quadratic_bwd import backward_quadratic_hopper  # not in every triton

            backward_quadratic_hopper(tensors, (dq, dk, dv), *options, plan.quadratic)
            return dq, dk, dv
        if plan.way == "wide":
            kept = None if matrix is None or key_row is None else State(matrix, key_row, key_row)
            backward_wide(tensors, (dq, dk, dv), *options, plan.wide, kept)
            return dq, dk, dv
        shifted = normalizer == "ratio" and query.dtype == torch.float16
        state = forward_state(key, value, feature_map, normalizer, scale, shifted)
        d_state = _query_side(d_out, query, dq, state, key.shape[1], *options)
        _key_side(key, value, dk, dv, d_state, state, feature_map, normalizer)
    return dq, dk, dv
