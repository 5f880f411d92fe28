"""Backward kernels of local attention for Hopper; how they work is told in `hopper_blocks.py`.

The mathematics is that of `triton_bwd.py`. lse in base 2 and delta lie in tiles of 64 tokens, so
that the copy engine brings them along: (B * H, tiles, 2 * 64), prefix first, then the grid in tiles
of 8 x 8, row by row; lse is infinite for tokens that do not exist, whose weights are then zero.

Own tokens are either on the grid (IMAGE) or `num_own` leading ones of a tensor whose tiles of 64
see all other tiles from number `first` on; the latter are cut into `parts` of `share` tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_blocks import (
    SIDE,
    TILE,
    advance,
    columns_of,
    copy,
    in_disc,
    init_barriers,
    load_tile,
    own_tile,
    sequence_of,
    skip,
    store_tile,
    tokens_left,
)
from .triton_blocks import tile_rows


@gluon.jit
def _range_of(number, blocks, first, share, stop):
    """Block of own tokens and part of a dense item, and the tiles that this part visits."""
    part = number // blocks
    start = first + part * share
    return number % blocks, part, start, gl.minimum(start + share, stop)


@gluon.jit
def _load(
    own_a_desc, own_b_desc, a_desc, b_desc, pa_desc, pb_desc, ea_desc, eb_desc, stats_desc,
    own_a_s, own_b_s, a_s, b_s, stats_s, own_full, own_empty, full, empty,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, together, blocks,
    first, share,
    IMAGE: gl.constexpr, STATS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: own tokens of all groups, then all tiles that any needs."""
    prefix_tiles = (num_prefix + TILE - 1) // TILE
    columns = (width + SIDE - 1) // SIDE
    grid_tiles = (height + SIDE - 1) // SIDE * columns
    own_bytes: gl.constexpr = own_a_desc.block_type.nbytes + own_b_desc.block_type.nbytes
    slot, phase, own_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        sequence, number = sequence_of(item, tiles, together)
        batch, head = sequence // heads, sequence % heads
        stats_row = sequence * (prefix_tiles + grid_tiles)
        block, _, start, stop = _range_of(number, blocks, first, share, prefix_tiles + grid_tiles)
        for group in gl.static_range(GROUPS):
            if IMAGE:
                y, x, _ = own_tile(number, group, height, width)
                place = [batch, head, y, x, 0]
            else:
                place = [batch, head, (GROUPS * block + group) * TILE, 0]
            mbarrier.wait(own_empty.index(group), own_phase ^ 1)
            mbarrier.expect(own_full.index(group), own_bytes)
            copy(own_a_desc, place, own_a_s, own_full, group)
            copy(own_b_desc, place, own_b_s, own_full, group)
        own_phase ^= 1
        if IMAGE:
            start, stop = 0, prefix_tiles
        for tile in range(start, gl.minimum(stop, prefix_tiles)):
            _load_with_stats(
                pa_desc, pb_desc, stats_desc, a_s, b_s, stats_s, full, empty,
                [batch, head, tile * TILE, 0], stats_row + tile, slot, phase, STATS,
            )  # fmt: skip
            slot, phase = advance(slot, phase, STAGES)
        if IMAGE:
            for token in range(0, num_extra, TILE):
                load_tile(
                    ea_desc, eb_desc, a_s, b_s, full, empty, [batch, head, token, 0], slot, phase
                )
                slot, phase = advance(slot, phase, STAGES)
            y, x, _ = own_tile(number, 0, height, width)
            first_row, last_row = tile_rows(y, height, limit, SIDE, SIDE)
            for row in range(first_row, last_row + 1):
                left, right = columns_of(row, y, x, width, limit, 2 * SIDE)
                for column in range(left, right + 1):
                    _load_with_stats(
                        a_desc, b_desc, stats_desc, a_s, b_s, stats_s, full, empty,
                        [batch, head, row * SIDE, column * SIDE, 0],
                        stats_row + prefix_tiles + row * columns + column, slot, phase, STATS,
                    )  # fmt: skip
                    slot, phase = advance(slot, phase, STAGES)
        else:
            for tile in range(gl.maximum(start, prefix_tiles), stop):
                at = tile - prefix_tiles
                _load_with_stats(
                    a_desc, b_desc, stats_desc, a_s, b_s, stats_s, full, empty,
                    [batch, head, at // columns * SIDE, at % columns * SIDE, 0],
                    stats_row + tile, slot, phase, STATS,
                )  # fmt: skip
                slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _load_with_stats(
    a_desc, b_desc, stats_desc, a_s, b_s, stats_s, full, empty, place, stats_row, slot, phase,
    STATS: gl.constexpr,
):  # fmt: skip
    """A tile of two tensors, and (STATS) of lse and delta."""
    if STATS:
        mbarrier.wait(empty.index(slot), phase ^ 1)
        mbarrier.expect(
            full.index(slot),
            a_desc.block_type.nbytes + b_desc.block_type.nbytes + stats_desc.block_type.nbytes,
        )
        copy(a_desc, place, a_s, full, slot)
        copy(b_desc, place, b_s, full, slot)
        copy(stats_desc, [stats_row, 0], stats_s, full, slot)
    else:
        load_tile(a_desc, b_desc, a_s, b_s, full, empty, place, slot, phase)


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
    q, do, lse, delta, dq, keep, k_s, v_s, full, empty, slot, phase, factor,
    DTYPE: gl.constexpr, S_LAYOUT: gl.constexpr, D_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dQ += dS K of the tile of keys in `slot`."""
    none = gl.zeros([TILE, TILE], gl.float32, S_LAYOUT)
    k, v = k_s.index(slot), v_s.index(slot)
    mbarrier.wait(full.index(slot), phase)
    scores = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
    d_weights = warpgroup_mma(do, v.permute((1, 0)), none, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * factor - lse[:, None])
    weights = gl.where(keep, weights, 0.0)
    d_weights = warpgroup_mma_wait(0, deps=[d_weights])
    d_scores = (weights * (d_weights - delta[:, None])).to(DTYPE)
    d_scores = gl.convert_layout(d_scores, gl.DotOperandLayout(0, D_LAYOUT, 2))
    dq = warpgroup_mma(d_scores, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    mbarrier.arrive(empty.index(slot))
    return dq


@gluon.jit
def _compute_dq(
    GROUP: gl.constexpr, IMAGE: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    dq_desc, p_part, p_stats, factor, scale, q_s, do_s, k_s, v_s, own_full, own_empty, full, empty,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, together, blocks,
    first, share, batches,
):  # fmt: skip
    """A computing group: gradients of its 64 queries of every item."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DTYPE: gl.constexpr = dq_desc.dtype
    o_m = gl.arange(0, TILE, gl.SliceLayout(1, S_LAYOUT))
    o_n = gl.arange(0, TILE, gl.SliceLayout(0, S_LAYOUT))
    prefix_tiles = (num_prefix + TILE - 1) // TILE
    dense_tiles = prefix_tiles + (num_extra + TILE - 1) // TILE
    columns = (width + SIDE - 1) // SIDE
    grid_tiles = (height + SIDE - 1) // SIDE * columns
    q, do = q_s.index(GROUP), do_s.index(GROUP)
    slot, phase, own_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        sequence, number = sequence_of(item, tiles, together)
        batch, head = sequence // heads, sequence % heads
        if IMAGE:
            y, x, exists = own_tile(number, GROUP, height, width)
            own = prefix_tiles + y // SIDE * columns + x // SIDE
        else:
            block, part, start, stop = _range_of(
                number, blocks, first, share, prefix_tiles + grid_tiles
            )
            y, x = 0, 0
            own = gl.minimum(GROUPS * block + GROUP, prefix_tiles - 1)
        own_y, own_x = y + o_m // SIDE, x + o_m % SIDE
        own += sequence * (prefix_tiles + grid_tiles)
        p_own = p_stats + own.to(gl.int64) * (2 * TILE)
        lse, delta = gl.load(p_own + o_m), gl.load(p_own + TILE + o_m)
        dq = gl.zeros([TILE, D], gl.float32, D_LAYOUT)
        mbarrier.wait(own_full.index(GROUP), own_phase)
        own_phase ^= 1
        if IMAGE:
            for tile in range(dense_tiles):
                keep = (o_n < tokens_left(tile, prefix_tiles, num_prefix, num_extra))[None, :]
                dq = _add_dq(
                    q, do, lse, delta, dq, keep, k_s, v_s, full, empty, slot, phase, factor,
                    DTYPE, S_LAYOUT, D_LAYOUT,
                )  # fmt: skip
                slot, phase = advance(slot, phase, STAGES)
            _, x_item, _ = own_tile(number, 0, height, width)
            first_row, last_row = tile_rows(y, height, limit, SIDE, SIDE)
            for row in range(first_row, last_row + 1):
                any_left, any_right = columns_of(row, y, x_item, width, limit, 2 * SIDE)
                left, right = columns_of(row, y, x, width, limit, SIDE)
                slot, phase = skip(full, empty, slot, phase, left - any_left, STAGES)
                for column in range(left, right + 1):
                    keep = in_disc(own_y, own_x, o_n, row, column, height, width, limit)
                    dq = _add_dq(
                        q, do, lse, delta, dq, keep, k_s, v_s, full, empty, slot, phase, factor,
                        DTYPE, S_LAYOUT, D_LAYOUT,
                    )  # fmt: skip
                    slot, phase = advance(slot, phase, STAGES)
                slot, phase = skip(full, empty, slot, phase, any_right - right, STAGES)
            store_tile(dq_desc, [batch, head, y, gl.where(exists, x, width), 0], q, dq * scale)
            tma.store_wait(0)
            mbarrier.arrive(own_empty.index(GROUP))
        else:
            for tile in range(start, stop):
                at = tile - prefix_tiles
                other_y = at // columns * SIDE + o_n // SIDE
                other_x = at % columns * SIDE + o_n % SIDE
                keep = (other_y < height) & (other_x < width)
                keep = gl.where(at < 0, tile * TILE + o_n < num_prefix, keep)[None, :]
                dq = _add_dq(
                    q, do, lse, delta, dq, keep, k_s, v_s, full, empty, slot, phase, factor,
                    DTYPE, S_LAYOUT, D_LAYOUT,
                )  # fmt: skip
                slot, phase = advance(slot, phase, STAGES)
            mbarrier.arrive(own_empty.index(GROUP))
            _store_part(
                p_part, dq * scale, part * batches + batch, head, heads, GROUPS * block + GROUP,
                num_prefix, D, D_LAYOUT,
            )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "heads", "height", "width", "num_prefix", "num_extra", "limit", "items", "tiles",
        "together", "blocks", "first", "share", "batches", "factor", "scale",
    ]
)  # fmt: skip
def _local_attention_bwd_dq_hopper_kernel(
    q_desc, do_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc, dq_desc, p_part, p_stats,
    factor, scale,
    heads, height, width, num_prefix, num_extra, limit, items, tiles, together, blocks,
    first, share, batches,
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
    own_full, own_empty = init_barriers(2, 1), init_barriers(2, 1)
    full, empty = init_barriers(STAGES, 1), init_barriers(STAGES, 2)
    shared = (
        dq_desc, p_part, p_stats, factor, scale, q_s, do_s, k_s, v_s,
        own_full, own_empty, full, empty, heads, height, width, num_prefix, num_extra, limit,
        items, tiles, together, blocks, first, share, batches,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_compute_dq, (0, IMAGE, D, 2, STAGES) + shared),  # noqa: RUF005 - no starred tuples
            (_compute_dq, (1, IMAGE, D, 2, STAGES) + shared),  # noqa: RUF005
            (_load, (
                q_desc, do_desc, k_desc, v_desc, pk_desc, pv_desc, ek_desc, ev_desc, k_desc,
                q_s, do_s, k_s, v_s, k_s, own_full, own_empty, full, empty,
                heads, height, width, num_prefix, num_extra, limit, items, tiles, together, blocks,
                first, share, IMAGE, False, 2, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _add_dkv(
    k, v, dk, dv, keep, q_s, do_s, stats_s, full, empty, slot, phase, factor,
    DTYPE: gl.constexpr, S_LAYOUT: gl.constexpr, D_LAYOUT: gl.constexpr, E_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dV += P^T dO and dK += dS^T Q of the tile of queries in `slot`: keys are rows."""
    none = gl.zeros([TILE, TILE], gl.float32, S_LAYOUT)
    q, do, stats = q_s.index(slot), do_s.index(slot), stats_s.index(slot)
    mbarrier.wait(full.index(slot), phase)
    scores = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
    d_weights = warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
    lse = stats.slice(0, TILE).load(gl.SliceLayout(0, S_LAYOUT))
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * factor - lse[None, :])
    weights = gl.where(keep, weights, 0.0)
    left = gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, E_LAYOUT, 2))
    dv = warpgroup_mma(left, do, dv, is_async=True)
    delta = stats.slice(TILE, TILE).load(gl.SliceLayout(0, S_LAYOUT))
    d_weights = warpgroup_mma_wait(1, deps=[d_weights])
    d_scores = (weights * (d_weights - delta[None, :])).to(DTYPE)
    left = gl.convert_layout(d_scores, gl.DotOperandLayout(0, D_LAYOUT, 2))
    dk = warpgroup_mma(left, q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    mbarrier.arrive(empty.index(slot))
    return dk, dv


@gluon.jit
def _compute_dkv(
    GROUP: gl.constexpr, IMAGE: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr,
    dk_desc, dv_desc, p_dk, p_dv, factor, scale, k_s, v_s, q_s, do_s, stats_s,
    own_full, own_empty, full, empty,
    heads, height, width, num_prefix, num_own, limit, items, tiles, together, blocks,
    first, share, batches,
):  # fmt: skip
    """A computing group: gradients of its 64 keys and values of every item."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    E_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    DTYPE: gl.constexpr = dk_desc.dtype
    o_m = gl.arange(0, TILE, gl.SliceLayout(1, S_LAYOUT))
    o_n = gl.arange(0, TILE, gl.SliceLayout(0, S_LAYOUT))
    prefix_tiles = (num_prefix + TILE - 1) // TILE
    columns = (width + SIDE - 1) // SIDE
    grid_tiles = (height + SIDE - 1) // SIDE * columns
    # Queries that do not exist have an infinite lse: no other mask is needed where all see all.
    everyone = gl.full([1, TILE], 1, gl.int1, S_LAYOUT)
    k, v = k_s.index(GROUP), v_s.index(GROUP)
    slot, phase, own_phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        sequence, number = sequence_of(item, tiles, together)
        batch, head = sequence // heads, sequence % heads
        dk = gl.zeros([TILE, D], gl.float32, D_LAYOUT)
        dv = gl.zeros([TILE, E], gl.float32, E_LAYOUT)
        block, part, start, stop = _range_of(
            number, blocks, first, share, prefix_tiles + grid_tiles
        )
        if IMAGE:
            start, stop = 0, prefix_tiles
        mbarrier.wait(own_full.index(GROUP), own_phase)
        own_phase ^= 1
        for _ in range(start, stop):
            dk, dv = _add_dkv(
                k, v, dk, dv, everyone, q_s, do_s, stats_s, full, empty, slot, phase, factor,
                DTYPE, S_LAYOUT, D_LAYOUT, E_LAYOUT,
            )  # fmt: skip
            slot, phase = advance(slot, phase, STAGES)
        if IMAGE:
            y, x, exists = own_tile(number, GROUP, height, width)
            own_y, own_x = y + o_m // SIDE, x + o_m % SIDE
            _, x_item, _ = own_tile(number, 0, height, width)
            first_row, last_row = tile_rows(y, height, limit, SIDE, SIDE)
            for row in range(first_row, last_row + 1):
                any_left, any_right = columns_of(row, y, x_item, width, limit, 2 * SIDE)
                left, right = columns_of(row, y, x, width, limit, SIDE)
                slot, phase = skip(full, empty, slot, phase, left - any_left, STAGES)
                for column in range(left, right + 1):
                    keep = in_disc(own_y, own_x, o_n, row, column, height, width, limit)
                    dk, dv = _add_dkv(
                        k, v, dk, dv, keep, q_s, do_s, stats_s, full, empty, slot, phase, factor,
                        DTYPE, S_LAYOUT, D_LAYOUT, E_LAYOUT,
                    )  # fmt: skip
                    slot, phase = advance(slot, phase, STAGES)
                slot, phase = skip(full, empty, slot, phase, any_right - right, STAGES)
            place = [batch, head, y, gl.where(exists, x, width), 0]
            store_tile(dk_desc, place, k, dk * scale)
            store_tile(dv_desc, place, v, dv)
            tma.store_wait(0)
            mbarrier.arrive(own_empty.index(GROUP))
        else:
            mbarrier.arrive(own_empty.index(GROUP))
            batch += part * batches
            block = GROUPS * block + GROUP
            _store_part(p_dk, dk * scale, batch, head, heads, block, num_own, D, D_LAYOUT)
            _store_part(p_dv, dv, batch, head, heads, block, num_own, E, E_LAYOUT)


@gluon.jit(
    do_not_specialize=[
        "heads", "height", "width", "num_prefix", "num_own", "limit", "items", "tiles",
        "together", "blocks", "first", "share", "batches", "factor", "scale",
    ]
)  # fmt: skip
def _local_attention_bwd_dkv_hopper_kernel(
    k_desc, v_desc, q_desc, do_desc, pq_desc, pdo_desc, stats_desc, dk_desc, dv_desc, p_dk, p_dv,
    factor, scale,
    heads, height, width, num_prefix, num_own, limit, items, tiles, together, blocks,
    first, share, batches,
    IMAGE: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of the image keys, or (IMAGE false) parts of them of `num_own` keys that all
    queries from tile `first` on see. Grid: one program a multiprocessor."""
    DTYPE: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(DTYPE, [2, TILE, D], LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [2, TILE, E], LAYOUT)
    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, D], LAYOUT)
    do_s = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, E], LAYOUT)
    stats_s = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * TILE], PLAIN)
    own_full, own_empty = init_barriers(2, 1), init_barriers(2, 1)
    full, empty = init_barriers(STAGES, 1), init_barriers(STAGES, 2)
    shared = (
        dk_desc, dv_desc, p_dk, p_dv, factor, scale, k_s, v_s, q_s, do_s, stats_s,
        own_full, own_empty, full, empty, heads, height, width, num_prefix, num_own, limit,
        items, tiles, together, blocks, first, share, batches,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_compute_dkv, (0, IMAGE, D, E, 2, STAGES) + shared),  # noqa: RUF005 - as above
            (_compute_dkv, (1, IMAGE, D, E, 2, STAGES) + shared),  # noqa: RUF005
            (_load, (
                k_desc, v_desc, q_desc, do_desc, pq_desc, pdo_desc, pq_desc, pdo_desc, stats_desc,
                k_s, v_s, q_s, do_s, stats_s, own_full, own_empty, full, empty,
                heads, height, width, num_prefix, 0, limit, items, tiles, together, blocks,
                first, share, IMAGE, True, 2, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
