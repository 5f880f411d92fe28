"""Forward kernel of local attention for Hopper; how it works is told in `hopper_blocks.py`."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .._common.launch import multiprocessors
from . import configs
from .hopper_blocks import (
    FAR,
    SIDE,
    TILE,
    advance,
    dense_descriptor,
    grid_descriptor,
    init_barriers,
    items_of,
    load,
    load_dense,
    load_disc,
    next_tile,
    place_of,
    skip,
    tokens_left,
)
from .triton_blocks import count_tiles, tile_rows


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc,
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries of both groups, then all tiles of keys that either needs."""
    slot, phase, q_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head, y, x = place_of(item, tiles, per_row, heads)
        for group in gl.static_range(2):
            place = [batch, head, y, x + group * SIDE, 0]
            load(q_desc, place, q_s, q_full, q_empty, group, q_phase)
        q_phase ^= 1
        slot, phase = load_dense(
            pk_desc, pv_desc, k_s, v_s, k_full, k_empty, v_full, v_empty, batch, head, num_prefix,
            slot, phase, STAGES,
        )  # fmt: skip
        slot, phase = load_dense(
            ek_desc, ev_desc, k_s, v_s, k_full, k_empty, v_full, v_empty, batch, head, num_extra,
            slot, phase, STAGES,
        )  # fmt: skip
        slot, phase = load_disc(
            k_desc, v_desc, k_s, v_s, k_full, k_empty, v_full, v_empty, batch, head, y, x,
            slot, phase, height, width, limit, STAGES,
        )  # fmt: skip


@gluon.jit
def _ask_scores(q, k_s, k_full, slot, phase, LAYOUT: gl.constexpr):
    """Starts q k^T of the tile of keys in `slot`."""
    mbarrier.wait(k_full.index(slot), phase)
    none = gl.zeros([TILE, TILE], gl.float32, LAYOUT)
    return warpgroup_mma(q, k_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _mask(
    scores, query_y, query_x, o_n, tile, prefix_tiles, dense_tiles, num_prefix, num_extra,
    row, column, y, x, height, width, limit,
):  # fmt: skip
    """Scores of the pairs that see each other; tiles that all do cost a branch."""
    if tile < dense_tiles:
        count = tokens_left(tile, prefix_tiles, num_prefix, num_extra)
        if count < TILE:
            scores = gl.where((o_n < count)[None, :], scores, float("-inf"))
    else:
        key_y, key_x = row * SIDE, column * SIDE
        far_y = gl.maximum(key_y + (SIDE - 1) - y, y + (SIDE - 1) - key_y)
        far_x = gl.maximum(key_x + (SIDE - 1) - x, x + (SIDE - 1) - key_x)
        cut = (key_y + SIDE > height) | (key_x + SIDE > width)
        if (far_y * far_y + far_x * far_x >= limit) | cut:
            keys_y, keys_x = key_y + o_n // SIDE, key_x + o_n % SIDE
            # Off the grid means outside every disc, as in `triton_blocks.far_outside`.
            keys_y = gl.where(keys_y < height, keys_y, keys_y + FAR)
            keys_x = gl.where(keys_x < width, keys_x, keys_x + FAR)
            dy = query_y[:, None] - keys_y[None, :]
            dx = query_x[:, None] - keys_x[None, :]
            scores = gl.where(dy * dy < limit - dx * dx, scores, float("-inf"))
    return scores


@gluon.jit
def _change(new_top, top, total, acc, factor, ACC_LAYOUT: gl.constexpr):
    """Sums and output in units of the new maxima."""
    change = gl.exp2((top - new_top) * factor)
    acc = acc * gl.convert_layout(change, gl.SliceLayout(1, ACC_LAYOUT))[:, None]
    return total * change, acc


@gluon.jit
def _weights(scores, top, total, factor, DTYPE: gl.constexpr, ACC_LAYOUT: gl.constexpr):
    weights = gl.exp2(scores * factor - (top * factor)[:, None])
    total += gl.sum(weights, 1)
    return gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, ACC_LAYOUT, 2)), total


@gluon.jit
def _compute(
    o_desc, p_lse, factor, q_s, k_s, v_s, o_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row,
    GROUP: gl.constexpr, DTYPE: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A computing group: its half of the queries of every item. The scores of a tile are asked for
    before the softmax of the tile before, so that the tensor cores work meanwhile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    o_m = gl.arange(0, TILE, gl.SliceLayout(1, S_LAYOUT))
    o_n = gl.arange(0, TILE, gl.SliceLayout(0, S_LAYOUT))
    prefix_tiles = (num_prefix + TILE - 1) // TILE
    dense_tiles = prefix_tiles + (num_extra + TILE - 1) // TILE
    q, o = q_s.index(GROUP), o_s.index(GROUP)
    slot, phase, q_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head, y, x_item = place_of(item, tiles, per_row, heads)
        x_own = x_item + GROUP * SIDE
        # A half off the grid follows the other one; nothing of it is stored.
        x = gl.where(x_own < width, x_own, x_item)
        query_y, query_x = y + o_m // SIDE, x + o_m % SIDE
        first_row, last_row = tile_rows(y, height, limit, SIDE, SIDE)
        count = dense_tiles + count_tiles(
            first_row, last_row, y, x, width, limit, SIDE, SIDE, SIDE, SIDE
        )  # fmt: skip
        top = gl.full([TILE], -1e38, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        top = top / gl.maximum(factor, 1.0)
        total = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        acc = gl.zeros([TILE, E], gl.float32, O_LAYOUT)
        row, column, last, any_last = first_row - 1, 0, 0, 0
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1
        for tile in range(0, count - 1, 2):
            slot, phase, row, column, last, any_last = next_tile(
                tile, dense_tiles, slot, phase, row, column, last, any_last,
                y, x, x_item, width, limit, k_full, k_empty, v_full, v_empty, STAGES,
            )  # fmt: skip
            first_slot, first_phase, tile_row, tile_column = slot, phase, row, column
            slot, phase = advance(slot, phase, STAGES)
            slot, phase, row, column, last, any_last = next_tile(
                tile + 1, dense_tiles, slot, phase, row, column, last, any_last,
                y, x, x_item, width, limit, k_full, k_empty, v_full, v_empty, STAGES,
            )  # fmt: skip
            scores = _ask_scores(q, k_s, k_full, first_slot, first_phase, S_LAYOUT)
            more = _ask_scores(q, k_s, k_full, slot, phase, S_LAYOUT)
            scores, more = warpgroup_mma_wait(0, deps=[scores, more])
            mbarrier.arrive(k_empty.index(first_slot))
            mbarrier.arrive(k_empty.index(slot))
            scores = _mask(
                scores, query_y, query_x, o_n, tile, prefix_tiles, dense_tiles,
                num_prefix, num_extra, tile_row, tile_column, y, x, height, width, limit,
            )  # fmt: skip
            more = _mask(
                more, query_y, query_x, o_n, tile + 1, prefix_tiles, dense_tiles,
                num_prefix, num_extra, row, column, y, x, height, width, limit,
            )  # fmt: skip
            new_top = gl.maximum(top, gl.max(gl.maximum(scores, more), 1))
            total, acc = _change(new_top, top, total, acc, factor, O_LAYOUT)
            top = new_top
            weights, total = _weights(scores, top, total, factor, DTYPE, O_LAYOUT)
            mbarrier.wait(v_full.index(first_slot), first_phase)
            mbarrier.wait(v_full.index(slot), phase)
            acc = warpgroup_mma(weights, v_s.index(first_slot), acc, is_async=True)
            weights, total = _weights(more, top, total, factor, DTYPE, O_LAYOUT)
            acc = warpgroup_mma(weights, v_s.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(first_slot))
            mbarrier.arrive(v_empty.index(slot))
            slot, phase = advance(slot, phase, STAGES)
        if count % 2 == 1:
            slot, phase, row, column, last, any_last = next_tile(
                count - 1, dense_tiles, slot, phase, row, column, last, any_last,
                y, x, x_item, width, limit, k_full, k_empty, v_full, v_empty, STAGES,
            )  # fmt: skip
            scores = _ask_scores(q, k_s, k_full, slot, phase, S_LAYOUT)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(slot))
            scores = _mask(
                scores, query_y, query_x, o_n, count - 1, prefix_tiles, dense_tiles,
                num_prefix, num_extra, row, column, y, x, height, width, limit,
            )  # fmt: skip
            new_top = gl.maximum(top, gl.max(scores, 1))
            total, acc = _change(new_top, top, total, acc, factor, O_LAYOUT)
            top = new_top
            weights, total = _weights(scores, top, total, factor, DTYPE, O_LAYOUT)
            mbarrier.wait(v_full.index(slot), phase)
            acc = warpgroup_mma(weights, v_s.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(slot))
            slot, phase = advance(slot, phase, STAGES)
        mbarrier.arrive(q_empty.index(GROUP))
        slot, phase = skip(k_full, k_empty, v_full, v_empty, slot, phase, any_last - last, STAGES)
        query_x = x_own + o_m % SIDE
        rows = num_prefix + query_y * width + query_x
        exists = (query_y < height) & (query_x < width)
        lse = (top * factor + gl.log2(total)) * 0.6931471805599453
        o_lse = (batch.to(gl.int64) * (num_prefix + height * width) + rows) * heads + head
        gl.store(p_lse + o_lse, lse, mask=exists)
        acc = acc / gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]
        tma.store_wait(0)
        o.store(acc.to(DTYPE))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            o_desc, [batch, head, y, x_own, 0],
            o._reinterpret(DTYPE, [1, 1, SIDE, SIDE, E], o_desc.layout),
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "heads", "height", "width", "num_prefix", "num_extra", "limit", "items", "tiles",
        "per_row", "factor",
    ]
)  # fmt: skip
def _local_attention_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc, o_desc, p_lse, factor,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """o and lse of the image queries. Grid: one program a multiprocessor; an item is a tile of
    8 x 16 queries of one head."""
    DTYPE: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_s = gl.allocate_shared_memory(DTYPE, [2, TILE, D], LAYOUT)
    o_s = gl.allocate_shared_memory(DTYPE, [2, TILE, E], LAYOUT)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, D], LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, E], LAYOUT)
    q_full, q_empty = init_barriers(2, 1), init_barriers(2, 1)
    # Both groups leave a tile of keys.
    k_full, k_empty = init_barriers(STAGES, 1), init_barriers(STAGES, 2)
    v_full, v_empty = init_barriers(STAGES, 1), init_barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_compute, (
                o_desc, p_lse, factor, q_s, k_s, v_s, o_s,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row,
                0, DTYPE, D, E, STAGES,
            )),
            (_compute, (
                o_desc, p_lse, factor, q_s, k_s, v_s, o_s,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row,
                1, DTYPE, D, E, STAGES,
            )),
            (_load, (
                q_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc,
                q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row,
                STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fill_image(
    inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor,
    height: int, width: int, num_prefix: int, limit: int, factor: float,
) -> None:  # fmt: skip
    """Writes the image queries of `out` and `lse`."""
    query, key, value, extra_key, extra_value = inputs
    batch, _, heads, head_dim = query.shape
    num_extra = extra_key.shape[1]
    images = [grid_descriptor(x, num_prefix, height, width) for x in (query, key, value, out)]
    prefix = [dense_descriptor(x, num_prefix) for x in (key, value)]
    extra = [dense_descriptor(x, num_extra) for x in (extra_key, extra_value)]
    items, tiles, per_row = items_of(batch, heads, height, width)
    _local_attention_fwd_hopper_kernel[(min(items, multiprocessors(query)),)](
        *images[:3], *prefix, *(extra if num_extra else prefix), images[3], lse, factor,
        heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row,
        D=head_dim, E=value.shape[3], STAGES=configs.hopper_stages(head_dim, value.shape[3]),
        num_warps=4,
    )  # fmt: skip
