"""Forward kernels of local attention and their launcher: every GPU, any strides."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.launch import (
    ceil_div,
    common_vector,
    device_guard,
    empty,
    strides_in_vectors,
    unit_last,
)
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


@triton.jit(
    do_not_specialize=[
        "parts", "batch", "rows", "heads", "l_sb", "l_sn", "l_sh", "rows_out",
    ]
)  # fmt: skip
def _merge_kernel(
    p_part, p_part_lse, p_o, p_lse, parts, batch, rows, heads, rows_out,
    o_sb, o_sn, o_sh, l_sb, l_sn, l_sh,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """lse = log sum_p exp(lse_p), o = sum_p exp(lse_p - lse) o_p. Grid (blocks of (token, head)
    pairs, B): parts (parts * B, T, H, E) and (parts * B, T, H), results in the first T of
    `rows_out` tokens."""
    o_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < rows * heads
    row, head = (o_m // heads).to(tl.int64), (o_m % heads).to(tl.int64)
    index = tl.program_id(1).to(tl.int64)
    o_out = (index * rows_out + row) * heads + head
    top = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    for _ in range(parts):
        lse = tl.load(p_part_lse + index * l_sb + row * l_sn + head * l_sh, mask=m_m, other=0.0)
        new_top = tl.maximum(top, lse)
        change, weight = tl.exp(top - new_top), tl.exp(lse - new_top)
        total = total * change + weight
        o = load_tokens(p_part + index * o_sb, row * o_sn + head * o_sh, m_m, 1, E, BLOCK_E)
        acc = acc * change[:, None] + o.to(tl.float32) * weight[:, None]
        top = new_top
        index += batch
    total = tl.where(m_m, total, 1.0)
    store_tokens(p_o, o_out, m_m, E, acc / total[:, None], E, BLOCK_E)
    tl.store(p_lse + o_out, top + tl.log(total), mask=m_m)


def _merge(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Writes the first tokens of `out` (B, N, H, E) and `lse` (B, N, H) from their parts
    (parts * B, T, H, E) and (parts * B, T, H)."""
    batch, num_tokens, heads, value_dim = out.shape
    rows, block = part.shape[1], 16
    _merge_kernel[(ceil_div(rows * heads, block), batch)](
        part, part_lse, out, lse, part.shape[0] // batch, batch, rows, heads, num_tokens,
        *part.stride()[:3], *part_lse.stride(),
        E=value_dim, BLOCK_E=configs.channel_block(value_dim), BLOCK=block, num_warps=4,
    )  # fmt: skip


def score_factors(scale: float) -> tuple[float, float]:
    """(sign, factor): scores are (sign q) k^T * factor in base 2 with a positive factor, so that
    the largest product has the largest score; scale 0 is sign 0."""
    sign = (scale > 0) - (scale < 0)
    return float(sign), abs(scale) * 1.4426950408889634 if sign else 1.0


def _fill_prefix_sdpa(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, num_prefix: int,
    scale: float,
) -> None:  # fmt: skip
    """Writes the first `num_prefix` queries of `out` and `lse` by cuDNN, ranges of keys as a
    batch."""
    parts = configs.sdpa_parts(query)
    q = query[:, :num_prefix].transpose(1, 2)
    k, v = (
        x.unflatten(1, (parts, -1)).flatten(0, 1).transpose(1, 2)
        if parts > 1
        else x.transpose(1, 2)
        for x in (key, value)
    )
    part, part_lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.expand(parts * q.shape[0], -1, -1, -1), k, v, None, True, scale=scale
    )
    _merge(part.transpose(1, 2), part_lse.flatten(2).transpose(1, 2), out, lse)


def _fill_prefix(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, num_prefix: int,
    scale: float,
) -> None:  # fmt: skip
    """Writes the first `num_prefix` queries of `out` and `lse`: dense attention, the keys split."""
    batch, num_tokens, heads, head_dim = query.shape
    value_dim = value.shape[3]
    launch = configs.launch_of("local_fwd", query, max(head_dim, value_dim))
    programs = ceil_div(num_prefix, launch.own_size)
    parts, share = configs.parts_of(num_tokens, launch.other_size, batch * heads * programs, query)
    part, part_lse = out, lse
    if parts > 1:
        part = empty(parts * batch, num_prefix, heads, value_dim, like=query, dtype=torch.float32)
        part_lse = empty(parts * batch, num_prefix, heads, like=query, dtype=torch.float32)
    vector = common_vector(query, key, value, part)
    strides = strides_in_vectors(vector, query, key, value)
    sign, factor = score_factors(scale)
    _local_attention_fwd_kernel[(batch * heads * programs, parts)](
        query, key, value, key, value, part, part_lse, sign, factor,
        heads, 1, num_tokens - num_prefix, num_prefix, 0, 1, share, programs,
        *strides, 0, 0, 0, 0, 0, 0, *strides_in_vectors(vector, part), *part_lse.stride(),
        IMAGE=False, VECTOR=vector, **launch.blocks(head_dim, value_dim),
    )  # fmt: skip
    if parts > 1:
        _merge(part, part_lse, out, lse)


def _fill_image(
    inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor,
    height: int, width: int, num_prefix: int, limit: int, scale: float,
) -> None:  # fmt: skip
    """Writes the image queries of `out` and `lse`."""
    query, _, value, extra_key, _ = inputs
    batch, _, heads, head_dim = query.shape
    value_dim = value.shape[3]
    launch = configs.launch_of("local_fwd", query, max(head_dim, value_dim))
    programs = launch.own_tiles(height, width)
    vector = common_vector(*inputs, out)
    sign, factor = score_factors(scale)
    _local_attention_fwd_kernel[(batch * heads * programs,)](
        *inputs, out, lse, sign, factor,
        heads, height, width, num_prefix, extra_key.shape[1], limit, 0, programs,
        *strides_in_vectors(vector, *inputs, out), *lse.stride(),
        IMAGE=True, VECTOR=vector, **launch.blocks(head_dim, value_dim),
    )  # fmt: skip


def local_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor, extra_value: Tensor,
    height: int, width: int, num_prefix: int, radius: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of `api.local_attention` on tensors that `api` has checked."""
    out = empty(*query.shape[:3], value.shape[3], like=query)
    lse = empty(*query.shape[:3], like=query, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    inputs = tuple(map(unit_last, (query, key, value, extra_key, extra_value)))
    limit = configs.disc_limit(height, width, radius)
    with device_guard(query):
        if configs.way_of("fwd", inputs, scale) == "hopper":
            from .hopper_fwd import fill_image  # Gluon is not in every triton

            factor = score_factors(scale)[1]
            fill_image(inputs, out, lse, height, width, num_prefix, limit, factor)
        else:
            _fill_image(inputs, out, lse, height, width, num_prefix, limit, scale)
        if num_prefix:
            sdpa = configs.prefix_way(query, value) == "sdpa"
            fill = _fill_prefix_sdpa if sdpa else _fill_prefix
            fill(*inputs[:3], out, lse, num_prefix, scale)
    return out, lse
