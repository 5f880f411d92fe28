"""Forward kernels of linear attention and their launchers.

Ways, which `configs.py` chooses between: one launch in which a program owns the state of one head;
a sweep over the keys, then one over the queries, both split; or the other order, with no state at
all (`triton_quadratic.py`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import (
    aligned,
    ceil_div,
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
    load_features,
    load_state,
    load_vector,
    load_vectors,
    moments,
    rows_dot_vector,
    rows_times,
    rows_times_state,
    scale_cast,
    shifts_of,
    store_tile,
    value_shifts_of,
)
from .triton_quadratic import attend_quadratic
from .triton_state import State, forward_state


@triton.jit
def _attend(
    p_q, p_o, q_stride, o_stride, start, stop, s00, s01, s10, s11, z0, z1, b0, b1, scale, eps,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, RATIO: tl.constexpr, BIASED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """o_i = g_i phi(q_i) S + b of the queries start <= i < stop, the state in registers."""
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_q.dtype.element_ty
    PRECISION: tl.constexpr = "tf32" if WIDE else "ieee"
    for m in range(start, stop, BLOCK):
        q1 = 0.0
        o_m = m + tl.arange(0, BLOCK)
        m_m = o_m < stop
        o_q = o_m.to(tl.int64) * q_stride
        o_o = o_m.to(tl.int64) * o_stride
        q0 = load_features(p_q, o_q, m_m, 0, D, D0, FEATURE)
        if D1 > 0:
            q1 = load_features(p_q, o_q, m_m, D0, D, D1, FEATURE)
        gains = tl.full((BLOCK,), 1.0, tl.float32) * scale
        if RATIO:
            gains = scale / (scale * rows_dot_vector(q0, q1, z0, z1, D1) + eps)
        q0 = q0.to(DTYPE)
        if D1 > 0:
            q1 = q1.to(DTYPE)
        o0 = rows_times(q0, q1, s00, s01, D1, PRECISION) * gains[:, None]
        if BIASED:
            o0 += b0[None, :]
        store_tile(p_o, o_o, m_m, 0, o0, E, E0)
        if E1 > 0:
            o1 = rows_times(q0, q1, s10, s11, D1, PRECISION) * gains[:, None]
            if BIASED:
                o1 += b1[None, :]
            store_tile(p_o, o_o, m_m, E0, o1, E, E1)


@triton.jit(
    do_not_specialize=[
        "num_queries", "num_keys", "heads", "scale", "eps", "q_sb", "k_sb", "v_sb", "o_sb",
    ]
)  # fmt: skip
def _linear_attention_fwd_fused_kernel(
    p_q, p_k, p_v, p_o, num_queries, num_keys, heads, scale, eps,
    q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, o_sb, o_sn, o_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * H): a program sums the state of its head over all keys, then writes all its
    queries; the state never leaves it."""
    RATIO: tl.constexpr = NORMALIZER == "ratio"
    CENTRED: tl.constexpr = NORMALIZER == "covariance"
    FOLD: tl.constexpr = folds(RATIO or CENTRED, E, E0, E1, p_q.dtype.element_ty)
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_q.dtype.element_ty
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR
    p_o += (batch * o_sb + head * o_sh) * VECTOR

    ck0, ck1, b0, b1 = 0.0, 0.0, 0.0, 0.0
    if CENTRED:
        ck0, ck1 = shifts_of(p_k, k_sn * VECTOR, num_keys, D, D0, D1, FEATURE)
        b0, b1 = value_shifts_of(p_v, v_sn * VECTOR, num_keys, E, E0, E1, False)
    s00, s01, s10, s11, z0, z1, a0, a1 = moments(
        p_k, p_v, p_k, p_k, k_sn * VECTOR, v_sn * VECTOR, 0, num_keys, ck0, ck1, b0, b1,
        D, D0, D1, E, E0, E1, FEATURE, CENTRED, False, False,
        RATIO or CENTRED, CENTRED, FOLD, WIDE, BLOCK,
    )  # fmt: skip
    if CENTRED:
        s00, s01, s10, s11 = centre(s00, s01, s10, s11, z0, z1, a0, a1, num_keys, D1, E1)
        b0 += a0 / num_keys
        if E1 > 0:
            b1 += a1 / num_keys
        scale /= num_keys
    s00, s01, s10, s11 = scale_cast(s00, s01, s10, s11, 1.0, DTYPE, D1, E1)
    _attend(
        p_q, p_o, q_sn * VECTOR, o_sn * VECTOR, 0, num_queries,
        s00, s01, s10, s11, z0, z1, b0, b1, scale, eps,
        D, D0, D1, E, E0, E1, FEATURE, RATIO, CENTRED, WIDE, BLOCK,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "num_queries", "tokens_per_program", "rows", "heads", "scale", "eps", "q_sb", "o_sb",
    ]
)  # fmt: skip
def _linear_attention_fwd_apply_kernel(
    p_q, p_o, p_state, p_key_row, p_value_row, num_queries, tokens_per_program, rows, heads,
    scale, eps, q_sb, q_sn, q_sh, o_sb, o_sn, o_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Narrow heads. Grid (B * H * ranges): a program keeps one state and writes a range of
    queries."""
    RATIO: tl.constexpr = NORMALIZER == "ratio"
    CENTRED: tl.constexpr = NORMALIZER == "covariance"
    DTYPE: tl.constexpr = tl.float32 if WIDE else p_q.dtype.element_ty
    row = tl.program_id(0) % rows
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    row = row.to(tl.int64)
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_o += (batch * o_sb + head * o_sh) * VECTOR
    start = (tl.program_id(0) // rows) * tokens_per_program
    stop = tl.minimum(start + tokens_per_program, num_queries)
    s00, s01, s10, s11 = load_state(p_state + row * D * E, D, D0, D1, E, E0, E1, DTYPE)
    z0, z1, b0, b1 = 0.0, 0.0, 0.0, 0.0
    if RATIO:
        z0, z1 = load_vectors(p_key_row + row * D, D, D0, D1)
    if CENTRED:
        b0, b1 = load_vectors(p_value_row + row * E, E, E0, E1)
        scale = 1.0
    _attend(
        p_q, p_o, q_sn * VECTOR, o_sn * VECTOR, start, stop,
        s00, s01, s10, s11, z0, z1, b0, b1, scale, eps,
        D, D0, D1, E, E0, E1, FEATURE, RATIO, CENTRED, WIDE, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_queries", "rows", "heads", "scale", "eps", "q_sb", "o_sb"])
def _linear_attention_fwd_apply_wide_kernel(
    p_q, p_o, p_state, p_key_row, p_value_row, num_queries, rows, heads, scale, eps,
    q_sb, q_sn, q_sh, o_sb, o_sn, o_sh,
    D: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZER: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Wide heads. Grid (B * H * tiles): a program streams the state past one tile of queries."""
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
        p_q, p_state + row * D * E, p_key_row, p_key_row + row * D, o_q, m_m, 1, D,
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


def _plan_fused(
    tensors: tuple[Tensor, Tensor, Tensor],
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> KernelCall:  # fmt: skip
    query, key, value = tensors
    batch, num_queries, heads, head_dim = query.shape
    value_dim = value.shape[3]
    launch = configs.launch_of("fwd_fused", query, max(head_dim, value_dim))
    d0, d1 = configs.parts_of(head_dim, "d", "fwd_fused", query.dtype)
    e0, e1 = configs.parts_of(value_dim, "e", "fwd_fused", query.dtype)
    out = query.new_empty((batch, num_queries, heads, value_dim), device="meta")
    vector = common_vector(*tensors, out)
    numbers = (
        num_queries, key.shape[1], heads, scale, eps, *strides_in_vectors(vector, *tensors, out),
    )  # fmt: skip
    constants = {
        "D": head_dim, "D0": d0, "D1": d1, "E": value_dim, "E0": e0, "E1": e1,
        "FEATURE": configs.kernel_feature(feature_map, query), "NORMALIZER": normalizer,
        "WIDE": query.dtype == torch.float16, "VECTOR": vector, "BLOCK": launch.block,
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip
    return KernelCall(_linear_attention_fwd_fused_kernel, (batch * heads,), numbers, constants)


class _Plan(NamedTuple):
    """The way that runs, the launch that is all of the fused one, the kernel that applies a wide
    state, and what is launched first and then, for tensors that begin at boundaries."""

    out_shape: tuple[int, ...]
    copied: bool
    way: str
    fused: KernelCall | None = None
    rows: str = "general"
    first: Memo | None = None
    second: Memo | None = None


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor],
    feature_map: str, normalizer: str, scale: float, eps: float, are_aligned: bool,
) -> _Plan:  # fmt: skip
    """`are_aligned` only tells plans apart: `ways` asks it, and no layout tells."""
    query, key, value = tensors
    out_shape = (*query.shape[:3], value.shape[3])
    if 0 in (*query.shape, *value.shape):
        return _Plan(out_shape, False, "empty")
    tensors = tuple(unit_last(x) for x in tensors)
    copied = any(x is not y for x, y in zip(tensors, (query, key, value), strict=True))
    way = ways.way_of("fwd", *tensors, normalizer)
    fused = None
    if way == "fused":
        fused = _plan_fused(tensors, feature_map, normalizer, scale, eps)
    rows = "general"
    if way == "wide" and normalizer != "covariance":
        out = query.new_empty(out_shape, device="meta")
        rows = ways.rows_kernel(tensors[0], out)
    return _Plan(out_shape, copied, way, fused, rows, Memo(), Memo())


_PLANS = Plans(_plan)


def _plan_apply(
    tensors: tuple[Tensor, Tensor], wide: bool,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> KernelCall:  # fmt: skip
    query, out = tensors
    batch, num_queries, heads, head_dim = query.shape
    value_dim = out.shape[3]
    rows = batch * heads
    name = "fwd_apply_wide" if wide else "fwd_apply"
    launch = configs.launch_of(name, query, max(head_dim, value_dim))
    e0, e1 = configs.parts_of(value_dim, "e", "fwd_apply", query.dtype)
    vector = common_vector(query, out)
    constants = {
        "D": head_dim, "E": value_dim, "E0": e0, "E1": e1,
        "FEATURE": configs.kernel_feature(feature_map, query), "NORMALIZER": normalizer,
        "WIDE": query.dtype == torch.float16, "VECTOR": vector, "BLOCK": launch.block,
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip
    numbers = (rows, heads, scale, eps, *strides_in_vectors(vector, query, out))
    if wide:
        kernel, numbers = _linear_attention_fwd_apply_wide_kernel, (num_queries, *numbers)
        grid = (rows * ceil_div(num_queries, launch.block),)
        return KernelCall(kernel, grid, numbers, {**constants, "BLOCK_R": launch.step})
    d0, d1 = configs.parts_of(head_dim, "d", "fwd_apply", query.dtype)
    ranges, share = configs.splits_of(num_queries, rows, query, launch)
    kernel, numbers = _linear_attention_fwd_apply_kernel, (num_queries, share, *numbers)
    return KernelCall(kernel, (rows * ranges,), numbers, {**constants, "D0": d0, "D1": d1})


_APPLY_PLANS = Plans(_plan_apply)


def _forward(
    query: Tensor, key: Tensor, value: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float, memo: Memo | None,
) -> tuple[Tensor, State | None]:  # fmt: skip
    """The output, and the state of a way that has one outside of its kernels."""
    options = (feature_map, normalizer, scale, eps)
    are_aligned = aligned(query, key, value)
    if not are_aligned:
        memo = None  # a layout's memos are those of aligned tensors
    plan = _PLANS((query, key, value), *options, are_aligned, memo=memo)
    out = empty(*plan.out_shape, like=query)
    state = None
    if plan.way == "empty":
        return out.zero_(), None
    if plan.copied:
        query, key, value = (unit_last(x) for x in (query, key, value))
    with device_guard(query):
        first, second = (plan.first, plan.second) if are_aligned else (None, None)
        if plan.fused is not None:
            plan.fused(query, key, value, out)
        elif plan.way == "quadratic":
            attend_quadratic(query, key, value, out, *options, memo=first)
        else:
            state = forward_state(key, value, feature_map, normalizer, scale, False, first)
            if plan.rows == "hopper" and aligned(query):
                from .hopper_rows import rows_times_state_hopper  # Gluon is not in every triton

                ratio = normalizer == "ratio"
                rows_times_state_hopper(
                    query, state.matrix, state.key_row, out, query,
                    "out", feature_map, ratio, scale, eps, second,
                )  # fmt: skip
            else:
                apply = _APPLY_PLANS((query, out), plan.way == "wide", *options, memo=second)
                apply(query, out, *state)
    return out, state


def linear_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float, *, memo: Memo | None = None,
) -> Tensor:  # fmt: skip
    """The operation of `api.linear_attention` on tensors that `api` has checked."""
    return _forward(query, key, value, feature_map, normalizer, scale, eps, memo)[0]


def linear_attention_fwd_keeping(
    query: Tensor, key: Tensor, value: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The output, and for wide heads the state ``(B * H, E, D)`` and z ``(B * H * D)``: a backward
    pass that has them need not sweep over keys and values again. None where it starts from another
    state, or would save less."""
    out, state = _forward(query, key, value, feature_map, normalizer, scale, eps, None)
    wide = max(query.shape[3], value.shape[3]) > configs.MAX_NARROW_DIM
    # In float16 the backward pass has a state of values less a shift.
    if state is None or not wide or normalizer == "covariance" or query.dtype == torch.float16:
        return out, None, None
    return out, state.matrix, state.key_row
