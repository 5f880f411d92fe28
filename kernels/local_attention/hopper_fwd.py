"""Forward kernel of local attention for Hopper; how it works is told in `hopper_blocks.py`."""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .._common.launch import multiprocessors
from . import configs
from .hopper_blocks import (
    SIDE,
    TILE,
    advance,
    columns_of,
    columns_of_item,
    copy,
    dense_descriptor,
    grid_descriptor,
    in_disc,
    init_barriers,
    is_whole,
    load_tile,
    own_tile,
    rows_of_item,
    skip,
    store_tile,
    tiles_of,
    tokens_left,
)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc,
    q_s, k_s, v_s, q_full, q_empty, full, empty,
    heads, height, width, num_prefix, num_extra, limit, items, tiles,
    GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries of all groups, then all tiles of keys that any needs."""
    slot, phase, q_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head = item // tiles // heads, item // tiles % heads
        for group in gl.static_range(GROUPS):
            y, x, _ = own_tile(item, group, tiles, height, width, GROUPS)
            mbarrier.wait(q_empty.index(group), q_phase ^ 1)
            mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
            copy(q_desc, [batch, head, y, x, 0], q_s, q_full, group)
        q_phase ^= 1
        for token in range(0, num_prefix, TILE):
            place = [batch, head, token, 0]
            load_tile(pk_desc, pv_desc, k_s, v_s, full, empty, place, slot, phase)
            slot, phase = advance(slot, phase, STAGES)
        for token in range(0, num_extra, TILE):
            place = [batch, head, token, 0]
            load_tile(ek_desc, ev_desc, k_s, v_s, full, empty, place, slot, phase)
            slot, phase = advance(slot, phase, STAGES)
        first_row, last_row = rows_of_item(item, tiles, height, width, limit, GROUPS)
        for row in range(first_row, last_row + 1):
            first, last = columns_of_item(row, item, tiles, height, width, limit, GROUPS)
            for column in range(first, last + 1):
                place = [batch, head, row * SIDE, column * SIDE, 0]
                load_tile(k_desc, v_desc, k_s, v_s, full, empty, place, slot, phase)
                slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _scores(q, k_s, full, slot, phase, LAYOUT: gl.constexpr):
    mbarrier.wait(full.index(slot), phase)
    scores = gl.zeros([TILE, TILE], gl.float32, LAYOUT)
    scores = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), scores, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[scores])


@gluon.jit
def _add_values(
    scores, top, total, acc, v_s, empty, slot, factor,
    DTYPE: gl.constexpr, ACC_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One step of the softmax over tiles of keys, see `triton_fwd._attend`."""
    new_top = gl.maximum(top, gl.max(scores, 1))
    weights = gl.exp2(scores * factor - (new_top * factor)[:, None])
    change = gl.exp2((top - new_top) * factor)
    total = total * change + gl.sum(weights, 1)
    acc = acc * gl.convert_layout(change, gl.SliceLayout(1, ACC_LAYOUT))[:, None]
    weights = gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, ACC_LAYOUT, 2))
    acc = warpgroup_mma(weights, v_s.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(slot))
    return new_top, total, acc


@gluon.jit
def _compute(
    GROUP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    o_desc, p_lse, factor, q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
    heads, height, width, num_prefix, num_extra, limit, items, tiles,
):  # fmt: skip
    """A computing group: its 64 queries of every item."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    DTYPE: gl.constexpr = o_desc.dtype
    o_m = gl.arange(0, TILE, gl.SliceLayout(1, S_LAYOUT))
    o_n = gl.arange(0, TILE, gl.SliceLayout(0, S_LAYOUT))
    prefix_tiles = (num_prefix + TILE - 1) // TILE
    dense_tiles = prefix_tiles + (num_extra + TILE - 1) // TILE
    q, o = q_s.index(GROUP), o_s.index(GROUP)
    slot, phase, q_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head = item // tiles // heads, item // tiles % heads
        y, x, exists = own_tile(item, GROUP, tiles, height, width, GROUPS)
        top = gl.full([TILE], -1e38, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        top = top / gl.maximum(factor, 1.0)
        total = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        acc = gl.zeros([TILE, E], gl.float32, O_LAYOUT)
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1
        for tile in range(dense_tiles):
            scores = _scores(q, k_s, full, slot, phase, S_LAYOUT)
            count = tokens_left(tile, prefix_tiles, num_prefix, num_extra)
            if count < TILE:
                scores = gl.where((o_n < count)[None, :], scores, float("-inf"))
            top, total, acc = _add_values(
                scores, top, total, acc, v_s, empty, slot, factor, DTYPE, O_LAYOUT
            )
            slot, phase = advance(slot, phase, STAGES)
        query_y, query_x = y + o_m // SIDE, x + o_m % SIDE
        first_row, last_row = rows_of_item(item, tiles, height, width, limit, GROUPS)
        for row in range(first_row, last_row + 1):
            any_first, any_last = columns_of_item(row, item, tiles, height, width, limit, GROUPS)
            first, last = columns_of(row, y, x, width, limit)
            first, last = gl.minimum(first, any_last + 1), gl.where(last < 0, any_last, last)
            slot, phase = skip(full, empty, slot, phase, first - any_first, STAGES)
            for column in range(first, last + 1):
                scores = _scores(q, k_s, full, slot, phase, S_LAYOUT)
                if not is_whole(row, column, y, x, height, width, limit):
                    keep = in_disc(query_y, query_x, o_n, row, column, height, width, limit)
                    scores = gl.where(keep, scores, float("-inf"))
                top, total, acc = _add_values(
                    scores, top, total, acc, v_s, empty, slot, factor, DTYPE, O_LAYOUT
                )
                slot, phase = advance(slot, phase, STAGES)
            slot, phase = skip(full, empty, slot, phase, any_last - last, STAGES)
        mbarrier.arrive(q_empty.index(GROUP))
        rows = num_prefix + query_y * width + query_x
        mask = (query_y < height) & (query_x < width) & exists
        lse = (top * factor + gl.log2(total)) * 0.6931471805599453
        o_lse = (batch.to(gl.int64) * (num_prefix + height * width) + rows) * heads + head
        gl.store(p_lse + o_lse, lse, mask=mask)
        acc = acc / gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]
        tma.store_wait(0)
        store_tile(o_desc, [batch, head, y, gl.where(exists, x, width), 0], o, acc)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "heads", "height", "width", "num_prefix", "num_extra", "limit", "items", "tiles", "factor",
    ]
)  # fmt: skip
def _local_attention_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc, o_desc, p_lse, factor,
    heads, height, width, num_prefix, num_extra, limit, items, tiles,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """o and lse of the image queries. Grid: one program a multiprocessor; an item is three tiles of
    8 x 8 queries of one head, of which there are `tiles` items."""
    DTYPE: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_s = gl.allocate_shared_memory(DTYPE, [3, TILE, D], LAYOUT)
    o_s = gl.allocate_shared_memory(DTYPE, [3, TILE, E], LAYOUT)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, D], LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, E], LAYOUT)
    q_full, q_empty = init_barriers(3, 1), init_barriers(3, 1)
    # All groups leave a tile of keys.
    full, empty = init_barriers(STAGES, 1), init_barriers(STAGES, 3)
    shared = (
        o_desc, p_lse, factor, q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
        heads, height, width, num_prefix, num_extra, limit, items, tiles,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_compute, (0, D, E, 3, STAGES) + shared),  # noqa: RUF005 - Triton knows no starred tuples
            (_compute, (1, D, E, 3, STAGES) + shared),  # noqa: RUF005
            (_compute, (2, D, E, 3, STAGES) + shared),  # noqa: RUF005
            (_load, (
                q_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc,
                q_s, k_s, v_s, q_full, q_empty, full, empty,
                heads, height, width, num_prefix, num_extra, limit, items, tiles, 3, STAGES,
            )),
        ],
        [4, 4, 1],
        [160, 160, 24],
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
    tiles = triton.cdiv(tiles_of(height, width), 3)
    items = batch * heads * tiles
    _local_attention_fwd_hopper_kernel[(min(items, multiprocessors(query)),)](
        *images[:3], *prefix, *(extra if num_extra else prefix), images[3], lse, factor,
        heads, height, width, num_prefix, num_extra, limit, items, tiles,
        D=head_dim, E=value.shape[3], STAGES=configs.hopper_stages("fwd", head_dim, value.shape[3]),
        num_warps=4,
    )  # fmt: skip
