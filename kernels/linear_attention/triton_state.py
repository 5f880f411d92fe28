"""The sweep over tokens that leaves a state: partial moments, their ordered sum, the launcher."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import aligned, ceil_div, common_vector, empty, strides_in_vectors
from .._common.plans import Memo, Plans
from . import configs, ways
from .triton_blocks import (
    centre,
    folds,
    load_vector,
    moments,
    scale_cast,
    shifts_of,
    store_state,
    store_vector,
    store_vectors,
    value_shifts_of,
)
from .triton_keys_first import moments_keys_first


@triton.jit
def transposed(x, WIDTH: tl.constexpr):
    """The transpose of a block of the state; an absent one is a scalar and stays."""
    return tl.trans(x) if WIDTH > 0 else x


@triton.jit(
    do_not_specialize=["num_tokens", "tokens_per_split", "heads", "factor", "count", "k_sb", "v_sb"]
)
def _linear_attention_fwd_moments_kernel(
    p_k, p_v, p_weight, p_gain, p_s, p_z, p_a, p_ck, p_cv,
    num_tokens, tokens_per_split, heads, factor, count, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    E: tl.constexpr, EB: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, CENTRED: tl.constexpr, SHIFTED: tl.constexpr, WEIGHTED: tl.constexpr,
    SUM_K: tl.constexpr, SUM_V: tl.constexpr, KEYS_FIRST: tl.constexpr,
    WIDE: tl.constexpr, FINAL: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moments of `triton_blocks.moments`. Grid (B * H * blocks of EB value columns, splits): a
    program sums its range of tokens. FINAL, for one split: finished state and rows, as the reduce
    kernel writes them. Else, or if SHIFTED, the first split also writes the shifts; the first block
    writes z."""
    BLOCKS: tl.constexpr = (E + EB - 1) // EB
    FOLD: tl.constexpr = folds(SUM_K and E == EB, E, E0, E1, p_k.dtype.element_ty)
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
    p_s += (o_part * E + block * EB) * D
    p_z += o_part * D
    p_a += o_part * E + block * EB

    ck0, ck1, cv0, cv1 = 0.0, 0.0, 0.0, 0.0
    if CENTRED:
        ck0, ck1 = shifts_of(p_k, k_sn * VECTOR, num_tokens, D, D0, D1, FEATURE)
    if CENTRED or SHIFTED:
        cv0, cv1 = value_shifts_of(p_v, v_sn * VECTOR, num_tokens, columns, E0, E1, SHIFTED)
    start = split * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, num_tokens)
    if KEYS_FIRST:
        a0, a1 = 0.0, 0.0
        s00, s01, s10, s11, z0, z1 = moments_keys_first(
            p_k, p_v, k_sn * VECTOR, v_sn * VECTOR, start, stop,
            D, D0, D1, columns, E0, E1, FEATURE, BLOCK,
        )  # fmt: skip
    else:
        s00, s01, s10, s11, z0, z1, a0, a1 = moments(
            p_k, p_v, p_weight, p_gain, k_sn * VECTOR, v_sn * VECTOR, start, stop,
            ck0, ck1, cv0, cv1, D, D0, D1, columns, E0, E1, FEATURE, CENTRED, SHIFTED, WEIGHTED,
            SUM_K, SUM_V, FOLD, WIDE, BLOCK,
        )  # fmt: skip
    if FINAL:
        if CENTRED:
            s00, s01, s10, s11 = centre(s00, s01, s10, s11, z0, z1, a0, a1, count, D1, E1)
            z0 = ck0 + z0 / count
            if D1 > 0:
                z1 = ck1 + z1 / count
        if SUM_V:
            a0 = cv0 + a0 / count
            if E1 > 0:
                a1 = cv1 + a1 / count
        s00, s01, s10, s11 = scale_cast(s00, s01, s10, s11, factor, tl.float32, D1, E1)
    elif CENTRED:  # noqa: SIM102 - known when compiling, the other when running
        if split == 0:
            store_vectors(p_ck + row * D, ck0, ck1, D, D0, D1)
            store_vectors(p_cv + row * E + block * EB, cv0, cv1, columns, E0, E1)
    if SHIFTED:  # noqa: SIM102 - known when compiling, the other when running
        if split == 0:
            store_vectors(p_cv + row * E + block * EB, cv0, cv1, columns, E0, E1)
    store_state(p_s, s00, s01, s10, s11, D, D0, D1, columns, E0, E1)
    if SUM_K:  # noqa: SIM102 - the first is known when compiling, the second when running
        if block == 0:
            store_vectors(p_z, z0, z1, D, D0, D1)
    if SUM_V:
        store_vectors(p_a, a0, a1, columns, E0, E1)


@triton.jit
def sum_of_parts(p_x, splits, stride, o_x, m_x, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Sum over the splits in a fixed order, PARTS loads in flight."""
    total = tl.zeros((WIDTH,), tl.float32)
    o_p = tl.arange(0, PARTS)
    for part in range(0, splits, PARTS):
        o_part = (part + o_p).to(tl.int64) * stride
        mask = (part + o_p < splits)[:, None] & m_x[None, :]
        total += tl.sum(tl.load(p_x + o_part[:, None] + o_x[None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["splits", "factor", "count"])
def _linear_attention_fwd_reduce_kernel(
    p_s, p_z, p_a, p_ck, p_cv, p_state, p_key_row, p_value_row, splits, factor, count,
    D: tl.constexpr, E: tl.constexpr, CENTRED: tl.constexpr,
    SUM_K: tl.constexpr, SUM_V: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """state = factor (sum S^T - a z^T / count), one cast. Grid (B * H, blocks of the flat state);
    the first block also writes the rows z or mean(phi(k)) and sum(v) / count."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    o_s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < D * E
    p_z += row * D
    p_a += row * E
    total = sum_of_parts(p_s + row * D * E, splits, rows * D * E, o_s, m_s, BLOCK, PARTS)
    if CENTRED:
        z = sum_of_parts(p_z, splits, rows * D, o_s % D, m_s, BLOCK, PARTS)
        a = sum_of_parts(p_a, splits, rows * E, o_s // D, m_s, BLOCK, PARTS)
        total -= z * a / count
    total = (total * factor).to(p_state.dtype.element_ty)
    tl.store(p_state + row * D * E + o_s, total, mask=m_s)
    if tl.program_id(1) == 0:
        if SUM_K:
            o_d = tl.arange(0, D_PAD)
            key_row = sum_of_parts(p_z, splits, rows * D, o_d, o_d < D, D_PAD, PARTS)
            if CENTRED:
                key_row = load_vector(p_ck + row * D, 0, D, D_PAD) + key_row / count
            store_vector(p_key_row + row * D, 0, key_row, D, D_PAD)
        if SUM_V:
            o_e = tl.arange(0, E_PAD)
            value_row = sum_of_parts(p_a, splits, rows * E, o_e, o_e < E, E_PAD, PARTS) / count
            if CENTRED:
                value_row += load_vector(p_cv + row * E, 0, E, E_PAD)
            store_vector(p_value_row + row * E, 0, value_row, E, E_PAD)


class State(NamedTuple):
    """What a sweep over tokens leaves of a head: (B * H, E, D), and rows of B * H times D and E."""

    matrix: Tensor
    key_row: Tensor
    value_row: Tensor


class Parts(NamedTuple):
    """Unfinished states, (splits, B * H, E, D) and rows; the shifts that their sums are around."""

    matrix: Tensor
    key_row: Tensor
    value_row: Tensor
    key_shift: Tensor
    value_shift: Tensor


def _pieces(like: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Float32 vectors of these sizes, or a few numbers longer: one allocation, each piece aligned;
    the host would wait longer for several, and for `Tensor.split`."""
    sizes = tuple(-(-size // 4) * 4 for size in sizes)
    return empty(sum(sizes), like=like, dtype=torch.float32).split_with_sizes(sizes)


def empty_state(rows: int, head_dim: int, value_dim: int, like: Tensor) -> State:
    dtype = configs.state_dtype(like.dtype)
    matrix = empty(rows, value_dim, head_dim, like=like, dtype=dtype)
    return State(matrix, *_pieces(like, rows * head_dim, rows * value_dim))


def empty_parts(splits: int, rows: int, head_dim: int, value_dim: int, like: Tensor) -> Parts:
    matrix = empty(splits, rows, value_dim, head_dim, like=like, dtype=torch.float32)
    keys, values = rows * head_dim, rows * value_dim
    return Parts(matrix, *_pieces(like, splits * keys, splits * values, keys, values))


def _plan_reduce(
    tensors: tuple[Tensor, Tensor],
    factor: float, count: int, centred: bool, sum_k: bool, sum_v: bool,
) -> KernelCall:  # fmt: skip
    matrix, _ = tensors
    splits, rows, value_dim, head_dim = matrix.shape
    block = 512
    constants = {
        "D": head_dim, "E": value_dim, "CENTRED": centred, "SUM_K": sum_k, "SUM_V": sum_v,
        "D_PAD": triton.next_power_of_2(head_dim), "E_PAD": triton.next_power_of_2(value_dim),
        "BLOCK": block, "PARTS": 8, "num_warps": 4,
    }  # fmt: skip
    grid = (rows, ceil_div(head_dim * value_dim, block))
    numbers = (splits, factor, float(count))
    return KernelCall(_linear_attention_fwd_reduce_kernel, grid, numbers, constants)


_REDUCE_PLANS = Plans(_plan_reduce)


def reduce_parts(
    parts: Parts,
    like: Tensor,
    *,
    factor: float,
    count: int,
    centred: bool,
    sum_k: bool,
    sum_v: bool,
    memo: Memo | None = None,
) -> State:
    """The finished state; see the kernel."""
    _, rows, value_dim, head_dim = parts.matrix.shape
    state = empty_state(rows, head_dim, value_dim, like)
    tensors = (parts.matrix, state.matrix)
    call = _REDUCE_PLANS(tensors, factor, count, centred, sum_k, sum_v, memo=memo)
    call(*parts, *state)
    return state


class _Sweep(NamedTuple):
    """The launch that sums each of `splits` ranges, how many of the fields of `Parts` it takes, and
    the plan of the sum of these."""

    splits: int
    call: KernelCall
    num_results: int
    reduce: Memo


def _plan_sweep(
    tensors: tuple[Tensor, Tensor, Tensor],
    factor: float, count: int, feature_map: str,
    centred: bool, shifted: bool, weighted: bool, sum_k: bool, sum_v: bool, are_aligned: bool,
) -> _Sweep:  # fmt: skip
    """`are_aligned` only tells plans apart: `ways.state_kernel` asks it, and no layout tells."""
    key, value, _ = tensors
    if not (centred or shifted or sum_v) and ways.state_kernel(key, value) == "hopper":
        from .hopper_state import plan_state_hopper

        options = (factor, feature_map, weighted, sum_k)
        return _Sweep(*plan_state_hopper(key, value, *options), num_results=2, reduce=Memo())
    batch, tokens, heads, head_dim = key.shape
    value_dim = value.shape[3]
    rows = batch * heads
    width = max(head_dim, value_dim)
    launch = configs.launch_of("fwd_moments", key, max(head_dim, min(value_dim, 128)))
    plain = sum_k and not (centred or shifted or weighted)
    keys_first = plain and configs.keys_first("fwd_moments", key, width)
    columns = configs.value_block(head_dim, value_dim, key.element_size())
    parts = "fwd_moments_keys_first" if keys_first else "fwd_moments"
    d0, d1 = configs.parts_of(head_dim, "d", parts, key.dtype)
    e0, e1 = configs.parts_of(columns, "e", parts, key.dtype)
    blocks = ceil_div(value_dim, columns)
    splits, share = configs.splits_of(tokens, rows * blocks, key, launch)
    vector = common_vector(key, value)
    numbers = (
        tokens, share, heads, factor, float(count), *strides_in_vectors(vector, key, value),
    )  # fmt: skip
    constants = {
        "D": head_dim, "D0": d0, "D1": d1, "E": value_dim, "EB": columns, "E0": e0, "E1": e1,
        "FEATURE": configs.kernel_feature(feature_map, key),
        "CENTRED": centred, "SHIFTED": shifted, "WEIGHTED": weighted,
        "SUM_K": sum_k, "SUM_V": sum_v, "KEYS_FIRST": keys_first,
        "WIDE": key.dtype == torch.float16, "FINAL": splits == 1,
        "VECTOR": vector, "BLOCK": launch.block,
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip
    grid = (rows * blocks, splits)
    call = KernelCall(_linear_attention_fwd_moments_kernel, grid, numbers, constants)
    return _Sweep(splits, call, num_results=5, reduce=Memo())


_SWEEP_PLANS = Plans(_plan_sweep)


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
    shifted: bool,
    weighted: bool,
    sum_k: bool,
    sum_v: bool,
    memo: Memo | None = None,
) -> State:
    """State of (key, value), each key weighed if `weighted`; if `shifted` the state of the values
    less their shift, which is then the row of values."""
    splits, call, num_results, reduce = _SWEEP_PLANS(
        (key, value, weight), factor, count, feature_map, centred, shifted, weighted, sum_k, sum_v,
        aligned(key, value), memo=memo,
    )  # fmt: skip
    rows, head_dim, value_dim = key.shape[0] * key.shape[2], key.shape[3], value.shape[3]
    if splits == 1:
        state = empty_state(rows, head_dim, value_dim, key)
        # Shifts of keys stay in the program: their place is filled, not used.
        results = (*state, state.key_row, state.value_row)
        call(key, value, weight, gain, *results[:num_results])
        return state
    parts = empty_parts(splits, rows, head_dim, value_dim, key)
    call(key, value, weight, gain, *parts[:num_results])
    state = reduce_parts(
        parts, key, factor=factor, count=count, centred=centred, sum_k=sum_k, sum_v=sum_v,
        memo=reduce,
    )  # fmt: skip
    return state._replace(value_row=parts.value_shift) if shifted else state


def forward_state(
    key: Tensor, value: Tensor, feature_map: str, normalizer: str, scale: float, shifted: bool,
    memo: Memo | None = None,
) -> State:  # fmt: skip
    """The state that queries meet: S and z for ratio, s Cov and both means for covariance."""
    covariance = normalizer == "covariance"
    return sweep(
        key, value, key, key,
        factor=scale / key.shape[1] if covariance else 1.0, count=key.shape[1],
        feature_map=feature_map, centred=covariance, shifted=shifted, weighted=False,
        sum_k=normalizer != "none", sum_v=covariance, memo=memo,
    )  # fmt: skip
