"""Forward kernel of local attention for every GPU and any strides, and the launcher of all."""

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
from . import configs
from .triton_blocks import (
    count_tiles,
    dot,
    far_outside,
    in_disc,
    load_tokens,
    next_tile,
    own_tokens,
    places,
    store_tokens,
    tile_columns,
    tile_rows,
)
from .triton_merge import Prefix, merge, plan_prefix_sdpa


@triton.jit
def _attend(q, k, v, keep, top, total, acc, factor):
    """One step of the softmax over tiles of keys; `top` and scores before `factor`, base 2."""
    scores = tl.where(keep, dot(q, tl.trans(k)), float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores * factor - (new_top * factor)[:, None])
    change = tl.exp2((top - new_top) * factor)
    total = total * change + tl.sum(weights, 1)
    acc = acc * change[:, None] + dot(weights.to(v.dtype), v)
    return new_top, total, acc


@triton.jit
def _attend_dense(
    q, p_k, p_v, k_sn, v_sn, start, stop, top, total, acc, factor,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """All keys `start` to `stop` of a sequence."""
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mask = rows < stop
        k = load_tokens(p_k, rows, mask, k_sn, D, BLOCK_D)
        v = load_tokens(p_v, rows, mask, v_sn, E, BLOCK_E)
        top, total, acc = _attend(q, k, v, mask[None, :], top, total, acc, factor)
    return top, total, acc


@triton.jit(
    do_not_specialize=[
        "heads", "height", "width", "num_prefix", "num_extra", "limit", "share", "programs",
        "q_sb", "k_sb", "v_sb", "ek_sb", "ev_sb", "o_sb", "l_sb", "l_sn", "l_sh",
        "sign", "factor",
    ]
)  # fmt: skip
def _local_attention_fwd_kernel(
    p_q, p_k, p_v, p_ek, p_ev, p_o, p_lse, sign, factor,
    heads, height, width, num_prefix, num_extra, limit, share, programs,
    q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, ek_sb, ek_sn, ek_sh, ev_sb, ev_sn, ev_sh,
    o_sb, o_sn, o_sh, l_sb, l_sn, l_sh,
    IMAGE: tl.constexpr, VECTOR: tl.constexpr,
    OWN_Y: tl.constexpr, OWN_X: tl.constexpr, OTHER_Y: tl.constexpr, OTHER_X: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """o = softmax(s) v, s = q k^T * scale = sign(scale) q k^T * factor * ln 2. Grid (B * H * tiles,
    ranges): a program owns a tile of queries, of the image or (IMAGE false) of the prefix; the
    latter see a range of `share` keys and write a part of the result for each."""
    BLOCK: tl.constexpr = OTHER_Y * OTHER_X
    sequence = tl.program_id(0) // programs
    batch = (sequence // heads).to(tl.int64)
    head = (sequence % heads).to(tl.int64)
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR
    k_sn = tl.cast(k_sn, tl.int64) * VECTOR
    v_sn = tl.cast(v_sn, tl.int64) * VECTOR
    rows, mask, y, x = own_tokens(
        tl.program_id(0) % programs, programs, num_prefix, height, width, IMAGE, OWN_Y, OWN_X
    )
    q = load_tokens(p_q, rows, mask, tl.cast(q_sn, tl.int64) * VECTOR, D, BLOCK_D)
    q = (q * sign).to(q.dtype)
    # Finite, so that a row without any key so far gives no nan; below every score.
    top = tl.full((OWN_Y * OWN_X,), -1e38, tl.float32) / tl.maximum(factor, 1.0)
    total = tl.zeros((OWN_Y * OWN_X,), tl.float32)
    acc = tl.zeros((OWN_Y * OWN_X, BLOCK_E), tl.float32)
    if IMAGE:
        top, total, acc = _attend_dense(
            q, p_k, p_v, k_sn, v_sn, 0, num_prefix, top, total, acc, factor,
            BLOCK, D, BLOCK_D, E, BLOCK_E,
        )  # fmt: skip
        p_ek += (batch * ek_sb + head * ek_sh) * VECTOR
        p_ev += (batch * ev_sb + head * ev_sh) * VECTOR
        top, total, acc = _attend_dense(
            q, p_ek, p_ev, tl.cast(ek_sn, tl.int64) * VECTOR, tl.cast(ev_sn, tl.int64) * VECTOR,
            0, num_extra, top, total, acc, factor, BLOCK, D, BLOCK_D, E, BLOCK_E,
        )  # fmt: skip
        o_own = tl.arange(0, OWN_Y * OWN_X)
        own_y, own_x = y + o_own // OWN_X, x + o_own % OWN_X
        row, last_row = tile_rows(y, height, limit, OWN_Y, OTHER_Y)
        count = count_tiles(
            row, last_row, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X
        )  # fmt: skip
        column, last = tile_columns(row, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X)
        for _ in range(count):
            key_y, key_x = places(row, column, OTHER_Y, OTHER_X)
            key_rows = num_prefix + key_y * width + key_x
            exists = (key_y < height) & (key_x < width)
            k = load_tokens(p_k, key_rows, exists, k_sn, D, BLOCK_D)
            v = load_tokens(p_v, key_rows, exists, v_sn, E, BLOCK_E)
            keep = in_disc(
                own_y[:, None], own_x[:, None],
                far_outside(key_y, height)[None, :], far_outside(key_x, width)[None, :], limit,
            )  # fmt: skip
            top, total, acc = _attend(q, k, v, keep, top, total, acc, factor)
            row, column, last = next_tile(
                row, column, last, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X
            )
    else:
        part = tl.program_id(1)
        stop = num_prefix + height * width
        top, total, acc = _attend_dense(
            q, p_k, p_v, k_sn, v_sn, part * share, tl.minimum((part + 1) * share, stop),
            top, total, acc, factor, BLOCK, D, BLOCK_D, E, BLOCK_E,
        )  # fmt: skip
        first = part.to(tl.int64) * (tl.num_programs(0) // (heads * programs))
        batch += first
    p_o += batch * o_sb * VECTOR + head * o_sh * VECTOR
    total = tl.where(mask, total, 1.0)
    acc = acc / total[:, None]
    store_tokens(p_o, rows, mask, tl.cast(o_sn, tl.int64) * VECTOR, acc, E, BLOCK_E)
    lse = (top * factor + tl.log2(total)) * 0.6931471805599453
    tl.store(p_lse + batch * l_sb + rows.to(tl.int64) * l_sn + head * l_sh, lse, mask=mask)


def score_factors(scale: float) -> tuple[float, float]:
    """(sign, factor): scores are (sign q) k^T * factor in base 2 with a positive factor, so that
    the largest product has the largest score; scale 0 is sign 0."""
    sign = (scale > 0) - (scale < 0)
    return float(sign), abs(scale) * 1.4426950408889634 if sign else 1.0


def _plan_image(
    inputs: tuple[Tensor, ...], num_extra: int, out: Tensor, lse: Tensor,
    height: int, width: int, num_prefix: int, limit: int, scale: float,
) -> KernelCall:  # fmt: skip
    """A call with `inputs`, `out` and `lse` writes the image queries."""
    query, _, value, _, _ = inputs
    batch, _, heads, head_dim = query.shape
    value_dim = value.shape[3]
    launch = configs.launch_of("local_fwd", query, max(head_dim, value_dim))
    programs = launch.own_tiles(height, width)
    vector = common_vector(*inputs, out)
    numbers = (
        *score_factors(scale), heads, height, width, num_prefix, num_extra, limit, 0, programs,
        *strides_in_vectors(vector, *inputs, out), *lse.stride(),
    )  # fmt: skip
    constants = {"IMAGE": True, "VECTOR": vector, **launch.blocks(head_dim, value_dim)}
    grid = (batch * heads * programs,)
    return KernelCall(_local_attention_fwd_kernel, grid, numbers, constants)


def _plan_prefix(
    inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor, num_prefix: int, scale: float
) -> Prefix:
    """Dense attention of the prefix queries, the keys split."""
    query, key, value = inputs[:3]
    batch, num_tokens, heads, head_dim = query.shape
    value_dim = value.shape[3]
    launch = configs.launch_of("local_fwd", query, max(head_dim, value_dim))
    programs = ceil_div(num_prefix, launch.own_size)
    parts, share = configs.parts_of(num_tokens, launch.other_size, batch * heads * programs, query)
    shape = (parts * batch, num_prefix, heads)
    part, part_lse = out, lse
    if parts > 1:
        part = empty(*shape, value_dim, like=out, dtype=torch.float32)
        part_lse = empty(*shape, like=lse)
    vector = common_vector(query, key, value, part)
    numbers = (
        *score_factors(scale),
        heads, 1, num_tokens - num_prefix, num_prefix, 0, 1, share, programs,
        *strides_in_vectors(vector, query, key, value), 0, 0, 0, 0, 0, 0,
        *strides_in_vectors(vector, part), *part_lse.stride(),
    )  # fmt: skip
    constants = {"IMAGE": False, "VECTOR": vector, **launch.blocks(head_dim, value_dim)}
    grid = (batch * heads * programs, parts)
    call = KernelCall(_local_attention_fwd_kernel, grid, numbers, constants)

    def fill(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
        if parts == 1:
            call(query, key, value, key, value, out, lse)
            return
        part = empty(*shape, value_dim, like=query, dtype=torch.float32)
        part_lse = empty(*shape, like=lse)
        call(query, key, value, key, value, part, part_lse)
        merge(part, part_lse, out, lse)

    return fill


def _five(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Query, key, value, extra key and value; for absent ones, of which nothing is read, key and
    value."""
    return inputs if len(inputs) == 5 else (*inputs, *inputs[1:])


class _Launches(NamedTuple):
    image: KernelCall
    prefix: Prefix | None


class _Plan(NamedTuple):
    """The launches of one layout, none for empty results: for `aligned` memory and for any."""

    out_shape: tuple[int, ...]
    copied: bool = False
    aligned: _Launches | None = None
    general: _Launches | None = None


def _plan(
    tensors: tuple[Tensor | None, ...],
    height: int, width: int, num_prefix: int, radius: float, scale: float,
) -> _Plan:  # fmt: skip
    given = tuple(x for x in tensors if x is not None)
    out_shape = (*given[0].shape[:3], given[2].shape[3])
    if 0 in out_shape:
        return _Plan(out_shape)
    inputs = tuple(unit_last(x) for x in given)
    copied = any(x is not y for x, y in zip(inputs, given, strict=True))
    way = configs.way_of("fwd", inputs, scale)
    num_extra = inputs[3].shape[1] if len(inputs) == 5 else 0
    inputs = _five(inputs)
    query, _, value, _, _ = inputs
    out = query.new_empty(out_shape, device="meta")
    lse = out.new_empty(out_shape[:3], dtype=torch.float32)
    limit = configs.disc_limit(height, width, radius)
    place = (height, width, num_prefix, limit)
    image = general_image = _plan_image(inputs, num_extra, out, lse, *place, scale)
    prefix = general_prefix = None
    if way == "hopper":
        from .hopper_fwd import plan_image  # Gluon is not in every triton

        image = plan_image(inputs, num_extra, out, *place, score_factors(scale)[1])
    if num_prefix:
        prefix = general_prefix = _plan_prefix(inputs, out, lse, num_prefix, scale)
        if configs.prefix_way(query, value) == "sdpa":
            prefix = plan_prefix_sdpa(inputs, num_prefix, scale)
    general = _Launches(general_image, general_prefix)
    return _Plan(out_shape, copied, _Launches(image, prefix), general)


_PLANS = Plans(_plan)


def local_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor,
    extra_key: Tensor | None, extra_value: Tensor | None,
    height: int, width: int, num_prefix: int, radius: float, scale: float,
    *, memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of `api.local_attention` on tensors that `api` has checked."""
    tensors = (query, key, value, extra_key, extra_value)
    plan = _PLANS(tensors, height, width, num_prefix, radius, scale, memo=memo)
    out = empty(*plan.out_shape, like=query)
    lse = empty(*plan.out_shape[:3], like=query, dtype=torch.float32)
    inputs = tuple(x for x in tensors if x is not None)
    if plan.copied:
        inputs = tuple(unit_last(x) for x in inputs)
    inputs = _five(inputs)
    launches = plan.aligned if aligned(*inputs) else plan.general
    if launches is not None:
        with device_guard(query):
            launches.image(*inputs, out, lse)
            if launches.prefix is not None:
                launches.prefix(*inputs[:3], out, lse)
    return out, lse
