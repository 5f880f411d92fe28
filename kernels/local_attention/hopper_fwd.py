"""Forward kernel of local attention for Hopper; how it works is told in `hopper_blocks.py`."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .._common.kernel_call import KernelCall
from .._common.launch import multiprocessors
from . import configs
from .hopper_blocks import (
    SIDE,
    TILE,
    advance,
    columns_of,
    copy,
    dense_box,
    grid_box,
    in_disc,
    init_barriers,
    load_tile,
    own_tile,
    sequence_of,
    skip,
    store_tile,
    tiles_of,
    tokens_left,
)
from .triton_blocks import tile_rows


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc,
    q_s, k_s, v_s, q_full, q_empty, full, empty,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, together,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries of both groups, then all tiles of keys that either needs."""
    slot, phase, q_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        sequence, number = sequence_of(item, tiles, together)
        batch, head = sequence // heads, sequence % heads
        for group in gl.static_range(2):
            y, x, _ = own_tile(number, group, height, width)
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
        y, x, _ = own_tile(number, 0, height, width)
        first_row, last_row = tile_rows(y, height, limit, SIDE, SIDE)
        for row in range(first_row, last_row + 1):
            first, last = columns_of(row, y, x, width, limit, 2 * SIDE)
            for column in range(first, last + 1):
                place = [batch, head, row * SIDE, column * SIDE, 0]
                load_tile(k_desc, v_desc, k_s, v_s, full, empty, place, slot, phase)
                slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _softmax(
    scores, top, total, acc, factor, DTYPE: gl.constexpr, ACC_LAYOUT: gl.constexpr
):  # fmt: skip
    """Weights of a tile, and maxima, sums and output in units of the new maxima; see
    `triton_fwd._attend`."""
    new_top = gl.maximum(top, gl.max(scores, 1))
    weights = gl.exp2(scores * factor - (new_top * factor)[:, None])
    change = gl.exp2((top - new_top) * factor)
    total = total * change + gl.sum(weights, 1)
    acc = acc * gl.convert_layout(change, gl.SliceLayout(1, ACC_LAYOUT))[:, None]
    weights = gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, ACC_LAYOUT, 2))
    return weights, new_top, total, acc


@gluon.jit
def _step(
    q, scores, top, total, acc, keep, k_s, v_s, full, empty, slot, phase, old_slot, is_first,
    factor, MASKED: gl.constexpr, DTYPE: gl.constexpr, S_LAYOUT: gl.constexpr,
    ACC_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Asks for the scores of the tile in `slot`, and meanwhile does the softmax and the values of
    the tile before. The first step has none before: its weights are zero, times any values."""
    mbarrier.wait(full.index(slot), phase)
    none = gl.zeros([TILE, TILE], gl.float32, S_LAYOUT)
    asked = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    weights, top, total, acc = _softmax(scores, top, total, acc, factor, DTYPE, ACC_LAYOUT)
    acc = warpgroup_mma(weights, v_s.index(old_slot), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[asked])
    if MASKED:
        scores = gl.where(keep, scores, float("-inf"))
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(old_slot), pred=not is_first)
    return scores, top, total, acc


@gluon.jit
def _compute(
    GROUP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    o_desc, p_lse, factor, q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, together,
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
        sequence, number = sequence_of(item, tiles, together)
        batch, head = sequence // heads, sequence % heads
        y, x_item, _ = own_tile(number, 0, height, width)
        _, x, exists = own_tile(number, GROUP, height, width)
        query_y, query_x = y + o_m // SIDE, x + o_m % SIDE
        top = gl.full([TILE], -1e38, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        top = top / gl.maximum(factor, 1.0)
        total = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        acc = gl.zeros([TILE, E], gl.float32, O_LAYOUT)
        scores = gl.full([TILE, TILE], float("-inf"), gl.float32, S_LAYOUT)
        # Not a second name of `slot`, which Triton would not carry through the loops.
        is_first, old_slot = slot >= 0, slot * 0
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1
        for tile in range(dense_tiles):
            old_slot = gl.where(is_first, slot, old_slot)
            scores, top, total, acc = _step(
                q, scores, top, total, acc, False, k_s, v_s, full, empty, slot, phase,
                old_slot, is_first, factor, False, DTYPE, S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
            count = tokens_left(tile, prefix_tiles, num_prefix, num_extra)
            if count < TILE:
                scores = gl.where((o_n < count)[None, :], scores, float("-inf"))
            is_first, old_slot = slot < 0, slot
            slot, phase = advance(slot, phase, STAGES)
        first_row, last_row = tile_rows(y, height, limit, SIDE, SIDE)
        any_last, last = 0, 0
        for row in range(first_row, last_row + 1):
            # The end of the row before; here, since a step still holds a tile of it.
            slot, phase = skip(full, empty, slot, phase, any_last - last, STAGES)
            any_first, any_last = columns_of(row, y, x_item, width, limit, 2 * SIDE)
            first, last = columns_of(row, y, x, width, limit, SIDE)
            slot, phase = skip(full, empty, slot, phase, first - any_first, STAGES)
            for column in range(first, last + 1):
                keep = in_disc(query_y, query_x, o_n, row, column, height, width, limit)
                old_slot = gl.where(is_first, slot, old_slot)
                scores, top, total, acc = _step(
                    q, scores, top, total, acc, keep, k_s, v_s, full, empty, slot, phase,
                    old_slot, is_first, factor, True, DTYPE, S_LAYOUT, O_LAYOUT,
                )  # fmt: skip
                is_first, old_slot = slot < 0, slot
                slot, phase = advance(slot, phase, STAGES)
        mbarrier.arrive(q_empty.index(GROUP))
        weights, top, total, acc = _softmax(scores, top, total, acc, factor, DTYPE, O_LAYOUT)
        acc = warpgroup_mma(weights, v_s.index(old_slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(old_slot))
        slot, phase = skip(full, empty, slot, phase, any_last - last, STAGES)
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
        "heads", "height", "width", "num_prefix", "num_extra", "limit", "items", "tiles",
        "together", "factor",
    ]
)  # fmt: skip
def _local_attention_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc, o_desc, p_lse, factor,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, together,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """o and lse of the image queries. Grid: one program a multiprocessor; an item is a tile of
    8 x 16 queries of one head, of which there are `tiles` items."""
    DTYPE: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_s = gl.allocate_shared_memory(DTYPE, [2, TILE, D], LAYOUT)
    o_s = gl.allocate_shared_memory(DTYPE, [2, TILE, E], LAYOUT)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, D], LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, E], LAYOUT)
    q_full, q_empty = init_barriers(2, 1), init_barriers(2, 1)
    # Both groups leave a tile of keys.
    full, empty = init_barriers(STAGES, 1), init_barriers(STAGES, 2)
    shared = (
        o_desc, p_lse, factor, q_s, k_s, v_s, o_s, q_full, q_empty, full, empty,
        heads, height, width, num_prefix, num_extra, limit, items, tiles, together,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_compute, (0, D, E, STAGES) + shared),  # noqa: RUF005 - Triton knows no starred tuples
            (_compute, (1, D, E, STAGES) + shared),  # noqa: RUF005
            (_load, (
                q_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc,
                q_s, k_s, v_s, q_full, q_empty, full, empty,
                heads, height, width, num_prefix, num_extra, limit, items, tiles, together, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def plan_image(
    inputs: tuple[Tensor, ...], num_extra: int, out: Tensor,
    height: int, width: int, num_prefix: int, limit: int, factor: float,
) -> KernelCall:  # fmt: skip
    """A call with `inputs`, `out` and lse writes the image queries. Tensors give their layout."""
    query, key, value, extra_key, extra_value = inputs
    batch, _, heads, head_dim = query.shape
    value_dim = value.shape[3]
    images = [(i, grid_box(inputs[i], num_prefix, height, width)) for i in range(3)]
    prefix = [(1, dense_box(key, num_prefix)), (2, dense_box(value, num_prefix))]
    extra = [(3, dense_box(extra_key, num_extra)), (4, dense_box(extra_value, num_extra))]
    result = (5, grid_box(out, num_prefix, height, width))
    boxes = [*images, *prefix, *(extra if num_extra else prefix), result]
    _, tiles = tiles_of(height, width)
    items = batch * heads * tiles
    together = configs.heads_together(heads, width, limit, 2 * (head_dim + value_dim))
    numbers = (
        factor, heads, height, width, num_prefix, num_extra, limit, items, tiles, together,
    )  # fmt: skip
    stages = configs.hopper_stages("fwd", head_dim, value_dim)
    constants = {"D": head_dim, "E": value_dim, "STAGES": stages, "num_warps": 4}
    return KernelCall(
        _local_attention_fwd_hopper_kernel, (min(items, multiprocessors(query)),),
        numbers, constants, boxes, only_boxes=6,
    )  # fmt: skip
