"""Backward kernels of local attention for Hopper; how they work is told in `hopper_blocks.py`.

The mathematics is that of `triton_bwd.py`. lse in base 2 and delta lie in tiles of 64 tokens, so
that the copy engine brings them along: (B * H, tiles, 2, 64), prefix first, then the grid in tiles
of 8 x 8, row by row; lse is infinite for tokens that do not exist, whose weights are then zero.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_blocks import (
    SIDE,
    TILE,
    advance,
    init_barriers,
    load,
    next_tile,
    place_of,
    seen,
    skip,
    tokens_left,
)
from .triton_blocks import count_tiles, tile_columns, tile_rows


@gluon.jit
def _part_of(item, tiles, per_row, heads, first, share, stop):
    """Batch, head, block of 128 tokens, part, and the tiles that this part visits."""
    sequence, within = item // tiles, item % tiles
    part = within // per_row
    start = first + part * share
    return (
        sequence // heads, sequence % heads, within % per_row, part, start,
        gl.minimum(start + share, stop),
    )  # fmt: skip


@gluon.jit
def _load_tile(
    a_desc, b_desc, stats_desc, a_s, b_s, stats_s, a_full, a_empty, b_full, b_empty,
    place, stats_row, slot, phase, STATS: gl.constexpr,
):  # fmt: skip
    """A tile of two tensors, and of lse and delta behind the barrier of the first."""
    if STATS:
        mbarrier.wait(a_empty.index(slot), phase ^ 1)
        mbarrier.expect(
            a_full.index(slot), a_desc.block_type.nbytes + stats_desc.block_type.nbytes
        )
        tma.async_copy_global_to_shared(
            a_desc, place, a_full.index(slot),
            a_s.index(slot)._reinterpret(a_desc.dtype, a_desc.block_type.shape, a_desc.layout),
        )  # fmt: skip
        tma.async_copy_global_to_shared(
            stats_desc, [stats_row, 0], a_full.index(slot),
            stats_s.index(slot)._reinterpret(
                stats_desc.dtype, stats_desc.block_type.shape, stats_desc.layout
            ),
        )  # fmt: skip
    else:
        load(a_desc, place, a_s, a_full, a_empty, slot, phase)
    load(b_desc, place, b_s, b_full, b_empty, slot, phase)


@gluon.jit
def _load(
    own_a_desc, own_b_desc, a_desc, b_desc, pa_desc, pb_desc, ea_desc, eb_desc, stats_desc,
    own_a_s, own_b_s, a_s, b_s, stats_s, own_a_full, own_b_full, own_empty,
    a_full, a_empty, b_full, b_empty,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row, first, share,
    IMAGE: gl.constexpr, STATS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: own tokens of both groups, then all tiles that either needs."""
    prefix_tiles = (num_prefix + TILE - 1) // TILE
    grid_columns = (width + SIDE - 1) // SIDE
    grid_tiles = (height + SIDE - 1) // SIDE * grid_columns
    slot, phase, own_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        if IMAGE:
            batch, head, y, x = place_of(item, tiles, per_row, heads)
            start, stop = 0, prefix_tiles
        else:
            batch, head, y, _, start, stop = _part_of(
                item, tiles, per_row, heads, first, share, prefix_tiles + grid_tiles
            )
        stats_row = (batch * heads + head) * (prefix_tiles + grid_tiles)
        for group in gl.static_range(2):
            if IMAGE:
                place = [batch, head, y, x + group * SIDE, 0]
            else:
                place = [batch, head, (2 * y + group) * TILE, 0]
            load(own_a_desc, place, own_a_s, own_a_full, own_empty, group, own_phase)
            load(own_b_desc, place, own_b_s, own_b_full, own_empty, group, own_phase)
        own_phase ^= 1
        for tile in range(start, gl.minimum(stop, prefix_tiles)):
            _load_tile(
                pa_desc, pb_desc, stats_desc, a_s, b_s, stats_s, a_full, a_empty, b_full, b_empty,
                [batch, head, tile * TILE, 0], stats_row + tile, slot, phase, STATS,
            )  # fmt: skip
            slot, phase = advance(slot, phase, STAGES)
        stats_row += prefix_tiles
        if IMAGE:
            for tile in range(0, num_extra, TILE):
                _load_tile(
                    ea_desc, eb_desc, stats_desc, a_s, b_s, stats_s, a_full, a_empty,
                    b_full, b_empty, [batch, head, tile, 0], 0, slot, phase, STATS,
                )  # fmt: skip
                slot, phase = advance(slot, phase, STAGES)
            first_row, last_row = tile_rows(y, height, limit, SIDE, SIDE)
            for row in range(first_row, last_row + 1):
                left, right = tile_columns(row, y, x, width, limit, SIDE, 2 * SIDE, SIDE, SIDE)
                for column in range(left, right + 1):
                    _load_tile(
                        a_desc, b_desc, stats_desc, a_s, b_s, stats_s, a_full, a_empty,
                        b_full, b_empty, [batch, head, row * SIDE, column * SIDE, 0],
                        stats_row + row * grid_columns + column, slot, phase, STATS,
                    )  # fmt: skip
                    slot, phase = advance(slot, phase, STAGES)
        else:
            for tile in range(gl.maximum(start - prefix_tiles, 0), stop - prefix_tiles):
                row, column = tile // grid_columns, tile % grid_columns
                _load_tile(
                    a_desc, b_desc, stats_desc, a_s, b_s, stats_s, a_full, a_empty,
                    b_full, b_empty, [batch, head, row * SIDE, column * SIDE, 0],
                    stats_row + tile, slot, phase, STATS,
                )  # fmt: skip
                slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _store_grid(desc, batch, head, y, x, staging, values, C: gl.constexpr):
    """Writes 8 x 8 tokens through shared memory, which is free again at the return."""
    staging.store(values.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(
        desc, [batch, head, y, x, 0],
        staging._reinterpret(desc.dtype, desc.block_type.shape, desc.layout),
    )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _store_part(
    p_part, values, batch, head, heads, block, num_tokens, C: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Writes 64 tokens of (parts * B, num_tokens, H, C) in float32."""
    rows = block * TILE + gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    o_c = gl.arange(0, C, gl.SliceLayout(0, LAYOUT))
    o_part = ((batch.to(gl.int64) * num_tokens + rows) * heads + head) * C
    pointers = p_part + o_part[:, None] + o_c[None, :]
    gl.store(pointers, values, mask=(rows < num_tokens)[:, None])


@gluon.jit
def _add_dq(
    q, do, lse, delta, dq, own_y, own_x, o_n, is_dense, count, row, column, height, width, limit,
    k_s, v_s, k_full, k_empty, v_full, v_empty, slot, phase, factor,
    DTYPE: gl.constexpr, S_LAYOUT: gl.constexpr, D_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dQ += dS K of the tile of keys in `slot`."""
    none = gl.zeros([TILE, TILE], gl.float32, S_LAYOUT)
    k, v = k_s.index(slot), v_s.index(slot)
    mbarrier.wait(k_full.index(slot), phase)
    scores = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot), phase)
    d_weights = warpgroup_mma(do, v.permute((1, 0)), none, use_acc=False, is_async=True)
    keep = seen(own_y, own_x, o_n, is_dense, count, row, column, height, width, limit)
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * factor - lse[:, None])
    weights = gl.where(keep, weights, 0.0)
    d_weights = warpgroup_mma_wait(0, deps=[d_weights])
    mbarrier.arrive(v_empty.index(slot))
    d_scores = (weights * (d_weights - delta[:, None])).to(DTYPE)
    d_scores = gl.convert_layout(d_scores, gl.DotOperandLayout(0, D_LAYOUT, 2))
    dq = warpgroup_mma(d_scores, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    mbarrier.arrive(k_empty.index(slot))
    return dq


@gluon.jit
def _compute_dq(
    dq_desc, p_part, p_stats, factor, scale, q_s, do_s, k_s, v_s, q_full, do_full, own_empty,
    k_full, k_empty, v_full, v_empty,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row, first, share, batches,
    GROUP: gl.constexpr, IMAGE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A computing group: gradients of its 64 queries of every item."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DTYPE: gl.constexpr = dq_desc.dtype
    o_m = gl.arange(0, TILE, gl.SliceLayout(1, S_LAYOUT))
    o_n = gl.arange(0, TILE, gl.SliceLayout(0, S_LAYOUT))
    prefix_tiles = (num_prefix + TILE - 1) // TILE
    dense_tiles = prefix_tiles + (num_extra + TILE - 1) // TILE
    grid_columns = (width + SIDE - 1) // SIDE
    grid_tiles = (height + SIDE - 1) // SIDE * grid_columns
    q, do = q_s.index(GROUP), do_s.index(GROUP)
    slot, phase, own_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        dq = gl.zeros([TILE, D], gl.float32, D_LAYOUT)
        if IMAGE:
            batch, head, y, x_item = place_of(item, tiles, per_row, heads)
            x_own = x_item + GROUP * SIDE
            # A half off the grid follows the other one; nothing of it is stored.
            x = gl.where(x_own < width, x_own, x_item)
            own = prefix_tiles + y // SIDE * grid_columns + x // SIDE
        else:
            batch, head, block, part, start, stop = _part_of(
                item, tiles, per_row, heads, first, share, prefix_tiles + grid_tiles
            )
            y, x, x_item = 0, 0, 0
            own = gl.minimum(2 * block + GROUP, prefix_tiles - 1)
        own_y, own_x = y + o_m // SIDE, x + o_m % SIDE
        p_own = p_stats + ((batch * heads + head) * (prefix_tiles + grid_tiles) + own).to(
            gl.int64
        ) * (2 * TILE)
        lse, delta = gl.load(p_own + o_m), gl.load(p_own + TILE + o_m)
        mbarrier.wait(q_full.index(GROUP), own_phase)
        mbarrier.wait(do_full.index(GROUP), own_phase)
        own_phase ^= 1
        if IMAGE:
            first_row, last_row = tile_rows(y, height, limit, SIDE, SIDE)
            count = dense_tiles + count_tiles(
                first_row, last_row, y, x, width, limit, SIDE, SIDE, SIDE, SIDE
            )  # fmt: skip
            row, column, last, any_last = first_row - 1, 0, 0, 0
            for tile in range(count):
                slot, phase, row, column, last, any_last = next_tile(
                    tile, dense_tiles, slot, phase, row, column, last, any_last,
                    y, x, x_item, width, limit, k_full, k_empty, v_full, v_empty, STAGES,
                )  # fmt: skip
                dq = _add_dq(
                    q, do, lse, delta, dq, own_y, own_x, o_n, tile < dense_tiles,
                    tokens_left(tile, prefix_tiles, num_prefix, num_extra), row, column,
                    height, width, limit,
                    k_s, v_s, k_full, k_empty, v_full, v_empty, slot, phase, factor,
                    DTYPE, S_LAYOUT, D_LAYOUT,
                )  # fmt: skip
                slot, phase = advance(slot, phase, STAGES)
            slot, phase = skip(
                k_full, k_empty, v_full, v_empty, slot, phase, any_last - last, STAGES
            )
            _store_grid(dq_desc, batch, head, y, x_own, q, dq * scale, D)
            mbarrier.arrive(own_empty.index(GROUP))
        else:
            for tile in range(start, stop):
                at = gl.maximum(tile - prefix_tiles, 0)
                dq = _add_dq(
                    q, do, lse, delta, dq, own_y, own_x, o_n, tile < prefix_tiles,
                    tokens_left(tile, prefix_tiles, num_prefix, 0),
                    at // grid_columns, at % grid_columns, height, width, 23200 * 23200,
                    k_s, v_s, k_full, k_empty, v_full, v_empty, slot, phase, factor,
                    DTYPE, S_LAYOUT, D_LAYOUT,
                )  # fmt: skip
                slot, phase = advance(slot, phase, STAGES)
            mbarrier.arrive(own_empty.index(GROUP))
            _store_part(
                p_part, dq * scale, part * batches + batch, head, heads, 2 * block + GROUP,
                num_prefix, D, D_LAYOUT,
            )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "heads", "height", "width", "num_prefix", "num_extra", "limit", "items", "tiles",
        "per_row", "first", "share", "batches", "factor", "scale",
    ]
)  # fmt: skip
def _local_attention_bwd_dq_hopper_kernel(
    q_desc, do_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc, dq_desc, p_part, p_stats,
    factor, scale,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row, first, share, batches,
    IMAGE: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of the image queries, or (IMAGE false) parts of dq of the prefix queries. Grid: one
    program a multiprocessor."""
    DTYPE: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_s = gl.allocate_shared_memory(DTYPE, [2, TILE, D], LAYOUT)
    do_s = gl.allocate_shared_memory(DTYPE, [2, TILE, E], LAYOUT)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, D], LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, E], LAYOUT)
    q_full, do_full, own_empty = init_barriers(2, 1), init_barriers(2, 1), init_barriers(2, 1)
    k_full, k_empty = init_barriers(STAGES, 1), init_barriers(STAGES, 2)
    v_full, v_empty = init_barriers(STAGES, 1), init_barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_compute_dq, (
                dq_desc, p_part, p_stats, factor, scale, q_s, do_s, k_s, v_s,
                q_full, do_full, own_empty, k_full, k_empty, v_full, v_empty,
                heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row,
                first, share, batches, 0, IMAGE, D, STAGES,
            )),
            (_compute_dq, (
                dq_desc, p_part, p_stats, factor, scale, q_s, do_s, k_s, v_s,
                q_full, do_full, own_empty, k_full, k_empty, v_full, v_empty,
                heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row,
                first, share, batches, 1, IMAGE, D, STAGES,
            )),
            (_load, (
                q_desc, do_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc, k_desc,
                q_s, do_s, k_s, v_s, k_s, q_full, do_full, own_empty,
                k_full, k_empty, v_full, v_empty,
                heads, height, width, num_prefix, num_extra, limit, items, tiles, per_row,
                first, share, IMAGE, False, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _add_dkv(
    k, v, dk, dv, own_y, own_x, o_n, is_dense, row, column, height, width, limit,
    q_s, do_s, stats_s, q_full, q_empty, do_full, do_empty, slot, phase, factor,
    DTYPE: gl.constexpr, S_LAYOUT: gl.constexpr, D_LAYOUT: gl.constexpr, E_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dV += P^T dO and dK += dS^T Q of the tile of queries in `slot`: keys are rows."""
    none = gl.zeros([TILE, TILE], gl.float32, S_LAYOUT)
    q, do, stats = q_s.index(slot), do_s.index(slot), stats_s.index(slot)
    mbarrier.wait(q_full.index(slot), phase)
    scores = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(slot), phase)
    d_weights = warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
    keep = seen(own_y, own_x, o_n, is_dense, TILE, row, column, height, width, limit)
    lse = stats.index(0).load(gl.SliceLayout(0, S_LAYOUT))
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * factor - lse[None, :])
    weights = gl.where(keep, weights, 0.0)
    left = gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, E_LAYOUT, 2))
    dv = warpgroup_mma(left, do, dv, is_async=True)
    delta = stats.index(1).load(gl.SliceLayout(0, S_LAYOUT))
    d_weights = warpgroup_mma_wait(1, deps=[d_weights])
    d_scores = (weights * (d_weights - delta[None, :])).to(DTYPE)
    left = gl.convert_layout(d_scores, gl.DotOperandLayout(0, D_LAYOUT, 2))
    dk = warpgroup_mma(left, q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    mbarrier.arrive(q_empty.index(slot))
    mbarrier.arrive(do_empty.index(slot))
    return dk, dv


@gluon.jit
def _compute_dkv(
    dk_desc, dv_desc, p_dk, p_dv, factor, scale, k_s, v_s, q_s, do_s, stats_s,
    k_full, v_full, own_empty, q_full, q_empty, do_full, do_empty,
    heads, height, width, num_prefix, num_keys, limit, items, tiles, per_row, first, share, batches,
    GROUP: gl.constexpr, IMAGE: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A computing group: gradients of its 64 keys and values of every item."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    E_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    DTYPE: gl.constexpr = dk_desc.dtype
    o_m = gl.arange(0, TILE, gl.SliceLayout(1, S_LAYOUT))
    o_n = gl.arange(0, TILE, gl.SliceLayout(0, S_LAYOUT))
    prefix_tiles = (num_prefix + TILE - 1) // TILE
    grid_columns = (width + SIDE - 1) // SIDE
    grid_tiles = (height + SIDE - 1) // SIDE * grid_columns
    k, v = k_s.index(GROUP), v_s.index(GROUP)
    slot, phase, own_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        dk = gl.zeros([TILE, D], gl.float32, D_LAYOUT)
        dv = gl.zeros([TILE, E], gl.float32, E_LAYOUT)
        mbarrier.wait(k_full.index(GROUP), own_phase)
        mbarrier.wait(v_full.index(GROUP), own_phase)
        own_phase ^= 1
        if IMAGE:
            batch, head, y, x_item = place_of(item, tiles, per_row, heads)
            x_own = x_item + GROUP * SIDE
            x = gl.where(x_own < width, x_own, x_item)
            own_y, own_x = y + o_m // SIDE, x + o_m % SIDE
            first_row, last_row = tile_rows(y, height, limit, SIDE, SIDE)
            count = prefix_tiles + count_tiles(
                first_row, last_row, y, x, width, limit, SIDE, SIDE, SIDE, SIDE
            )  # fmt: skip
            row, column, last, any_last = first_row - 1, 0, 0, 0
            for tile in range(count):
                slot, phase, row, column, last, any_last = next_tile(
                    tile, prefix_tiles, slot, phase, row, column, last, any_last,
                    y, x, x_item, width, limit, q_full, q_empty, do_full, do_empty, STAGES,
                )  # fmt: skip
                dk, dv = _add_dkv(
                    k, v, dk, dv, own_y, own_x, o_n, tile < prefix_tiles, row, column,
                    height, width, limit,
                    q_s, do_s, stats_s, q_full, q_empty, do_full, do_empty, slot, phase, factor,
                    DTYPE, S_LAYOUT, D_LAYOUT, E_LAYOUT,
                )  # fmt: skip
                slot, phase = advance(slot, phase, STAGES)
            slot, phase = skip(
                q_full, q_empty, do_full, do_empty, slot, phase, any_last - last, STAGES
            )
            _store_grid(dk_desc, batch, head, y, x_own, k, dk * scale, D)
            _store_grid(dv_desc, batch, head, y, x_own, v, dv, E)
            mbarrier.arrive(own_empty.index(GROUP))
        else:
            batch, head, block, part, start, stop = _part_of(
                item, tiles, per_row, heads, first, share, prefix_tiles + grid_tiles
            )
            for tile in range(start, stop):
                at = gl.maximum(tile - prefix_tiles, 0)
                dk, dv = _add_dkv(
                    k, v, dk, dv, o_m // SIDE, o_m % SIDE, o_n, tile < prefix_tiles,
                    at // grid_columns, at % grid_columns, height, width, 23200 * 23200,
                    q_s, do_s, stats_s, q_full, q_empty, do_full, do_empty, slot, phase, factor,
                    DTYPE, S_LAYOUT, D_LAYOUT, E_LAYOUT,
                )  # fmt: skip
                slot, phase = advance(slot, phase, STAGES)
            mbarrier.arrive(own_empty.index(GROUP))
            batch += part * batches
            block = 2 * block + GROUP
            _store_part(p_dk, dk * scale, batch, head, heads, block, num_keys, D, D_LAYOUT)
            _store_part(p_dv, dv, batch, head, heads, block, num_keys, E, E_LAYOUT)


@gluon.jit(
    do_not_specialize=[
        "heads", "height", "width", "num_prefix", "num_keys", "limit", "items", "tiles",
        "per_row", "first", "share", "batches", "factor", "scale",
    ]
)  # fmt: skip
def _local_attention_bwd_dkv_hopper_kernel(
    k_desc, v_desc, q_desc, do_desc, pq_desc, pdo_desc, stats_desc, dk_desc, dv_desc, p_dk, p_dv,
    factor, scale,
    heads, height, width, num_prefix, num_keys, limit, items, tiles, per_row, first, share, batches,
    IMAGE: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of the image keys, or (IMAGE false) parts of them of `num_keys` keys that all
    queries from tile `first` on see. Grid: one program a multiprocessor."""
    DTYPE: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    k_s = gl.allocate_shared_memory(DTYPE, [2, TILE, D], LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [2, TILE, E], LAYOUT)
    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, D], LAYOUT)
    do_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, E], LAYOUT)
    stats_s = gl.allocate_shared_memory(gl.float32, [STAGES, 2, TILE], PLAIN)
    k_full, v_full, own_empty = init_barriers(2, 1), init_barriers(2, 1), init_barriers(2, 1)
    q_full, q_empty = init_barriers(STAGES, 1), init_barriers(STAGES, 2)
    do_full, do_empty = init_barriers(STAGES, 1), init_barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_compute_dkv, (
                dk_desc, dv_desc, p_dk, p_dv, factor, scale, k_s, v_s, q_s, do_s, stats_s,
                k_full, v_full, own_empty, q_full, q_empty, do_full, do_empty,
                heads, height, width, num_prefix, num_keys, limit, items, tiles, per_row,
                first, share, batches, 0, IMAGE, D, E, STAGES,
            )),
            (_compute_dkv, (
                dk_desc, dv_desc, p_dk, p_dv, factor, scale, k_s, v_s, q_s, do_s, stats_s,
                k_full, v_full, own_empty, q_full, q_empty, do_full, do_empty,
                heads, height, width, num_prefix, num_keys, limit, items, tiles, per_row,
                first, share, batches, 1, IMAGE, D, E, STAGES,
            )),
            (_load, (
                k_desc, v_desc, q_desc, do_desc, pq_desc, pdo_desc, pq_desc, pdo_desc, stats_desc,
                k_s, v_s, q_s, do_s, stats_s, k_full, v_full, own_empty,
                q_full, q_empty, do_full, do_empty,
                heads, height, width, num_prefix, 0, limit, items, tiles, per_row,
                first, share, IMAGE, True, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
