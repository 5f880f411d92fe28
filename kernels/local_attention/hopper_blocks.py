"""Pieces of the Hopper kernels of local attention: items, the loading warp, rings, masks.

A program keeps running and takes every n-th item: 8 x 16 tokens of the grid that two groups of four
warps own, 8 x 8 each (or 2 x 64 tokens of a sequence). One more warp loads: tiles of 8 x 8 other
tokens come through the copy engine (TMA) straight from the raster order into a ring of shared
memory, once for both groups; a group skips those its discs do not touch. Written in Gluon, since
Triton's own language does not specialise warps on this architecture.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .triton_blocks import tile_columns, tile_rows

SIDE = gl.constexpr(8)
TILE = gl.constexpr(64)
# Squares of distances on any grid are smaller, those to a token out of it are not.
EVERYWHERE = gl.constexpr(23200 * 23200)
FAR = gl.constexpr(23200)
FARTHEST = gl.constexpr(23200 + 16384)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next place in the ring; `phase` turns with each round."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def place_of(item, tiles, per_row, heads):
    """Batch, head, and the first row and column of the tokens of an item on the grid."""
    sequence, tile = item // tiles, item % tiles
    y, x = (tile // per_row) * SIDE, (tile % per_row) * (2 * SIDE)
    return sequence // heads, sequence % heads, y, x


@gluon.jit
def load(desc, place, ring, full, empty, slot, phase):
    """Starts a copy into `slot` of the ring once nobody reads it any more."""
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(
        desc, place, full.index(slot),
        ring.index(slot)._reinterpret(desc.dtype, desc.block_type.shape, desc.layout),
    )  # fmt: skip


@gluon.jit
def skip(a_full, a_empty, b_full, b_empty, slot, phase, count, STAGES: gl.constexpr):
    """Passes tiles that only the other group needs; their arrival keeps the rounds in step."""
    for _ in range(count):
        mbarrier.wait(a_full.index(slot), phase)
        mbarrier.arrive(a_empty.index(slot))
        mbarrier.wait(b_full.index(slot), phase)
        mbarrier.arrive(b_empty.index(slot))
        slot, phase = advance(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def next_tile(
    tile, dense_tiles, slot, phase, row, column, last, any_last, y, x, x_item, width, limit,
    a_full, a_empty, b_full, b_empty, STAGES: gl.constexpr,
):  # fmt: skip
    """Goes to the group's tile number `tile`: slot and phase, row and column on the grid, last
    column of this row for the group and for the item."""
    if (tile >= dense_tiles) & (column == last):
        slot, phase = skip(a_full, a_empty, b_full, b_empty, slot, phase, any_last - last, STAGES)
        row += 1
        any_first, any_last = tile_columns(row, y, x_item, width, limit, SIDE, 2 * SIDE, SIDE, SIDE)
        column, last = tile_columns(row, y, x, width, limit, SIDE, SIDE, SIDE, SIDE)
        slot, phase = skip(
            a_full, a_empty, b_full, b_empty, slot, phase, column - any_first, STAGES
        )
    else:
        column = gl.where(tile >= dense_tiles, column + 1, column)
    return slot, phase, row, column, last, any_last


@gluon.jit
def tokens_left(tile, prefix_tiles, num_prefix, num_extra):
    """How many tokens a dense tile and those after it in its run have."""
    is_prefix = tile < prefix_tiles
    count = gl.where(is_prefix, num_prefix, num_extra)
    return count - TILE * gl.where(is_prefix, tile, tile - prefix_tiles)


@gluon.jit
def seen(
    own_y, own_x, o_n, is_dense, count, row, column, height, width, limit
):  # fmt: skip
    """Which pairs see each other, without a branch: the first `count` tokens of a dense tile lie at
    the corner of the grid within an endless disc, tokens that do not exist outside every disc."""
    other_y, other_x = row * SIDE + o_n // SIDE, column * SIDE + o_n % SIDE
    other_y = gl.where(other_y < height, other_y, other_y + FAR)
    other_x = gl.where(other_x < width, other_x, other_x + FAR)
    other_y = gl.where(is_dense, 0, other_y)
    other_x = gl.where(is_dense, gl.where(o_n < count, 0, FARTHEST), other_x)
    dy = own_y[:, None] - other_y[None, :]
    dx = own_x[:, None] - other_x[None, :]
    return dy * dy < gl.where(is_dense, EVERYWHERE, limit) - dx * dx


@gluon.jit
def load_dense(
    a_desc, b_desc, a_s, b_s, a_full, a_empty, b_full, b_empty, batch, head, count, slot, phase,
    STAGES: gl.constexpr,
):  # fmt: skip
    for first in range(0, count, TILE):
        load(a_desc, [batch, head, first, 0], a_s, a_full, a_empty, slot, phase)
        load(b_desc, [batch, head, first, 0], b_s, b_full, b_empty, slot, phase)
        slot, phase = advance(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def load_disc(
    a_desc, b_desc, a_s, b_s, a_full, a_empty, b_full, b_empty, batch, head, y, x, slot, phase,
    height, width, limit, STAGES: gl.constexpr,
):  # fmt: skip
    """All tiles that discs around the 8 x 16 tokens at (y, x) touch, row by row."""
    first_row, last_row = tile_rows(y, height, limit, SIDE, SIDE)
    for row in range(first_row, last_row + 1):
        first, last = tile_columns(row, y, x, width, limit, SIDE, 2 * SIDE, SIDE, SIDE)
        for column in range(first, last + 1):
            place = [batch, head, row * SIDE, column * SIDE, 0]
            load(a_desc, place, a_s, a_full, a_empty, slot, phase)
            load(b_desc, place, b_s, b_full, b_empty, slot, phase)
            slot, phase = advance(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def init_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier for each place of a ring."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


def _strides(tensor: Tensor) -> list[int]:
    """Strides of (B, N, H, D); the copy engine wants a proper one where a size of 1 has any."""
    return [
        stride if size > 1 else TILE.value
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def grid_descriptor(tensor: Tensor, first: int, height: int, width: int) -> TensorDescriptor:
    """Boxes of 8 x 8 tokens of (B, N, H, D), whose tokens from `first` on lie on the grid."""
    batch, _, heads, channels = tensor.shape
    s_b, s_n, s_h, _ = _strides(tensor)
    shape, strides = [batch, heads, height, width, channels], [s_b, s_h, width * s_n, s_n, 1]
    block = [1, 1, SIDE.value, SIDE.value, channels]
    return TensorDescriptor(
        tensor[:, first:], shape, strides, block, gl.NVMMASharedLayout(128, 16, 5)
    )


def dense_descriptor(tensor: Tensor, count: int) -> TensorDescriptor:
    """Boxes of 64 of the first `count` tokens of (B, N, H, D)."""
    batch, _, heads, channels = tensor.shape
    s_b, s_n, s_h, _ = _strides(tensor)
    shape, strides = [batch, heads, max(count, 1), channels], [s_b, s_h, s_n, 1]
    layout = gl.NVMMASharedLayout(128, 16, 4)
    return TensorDescriptor(tensor, shape, strides, [1, 1, TILE.value, channels], layout)


def items_of(batch: int, heads: int, height: int, width: int) -> tuple[int, int, int]:
    """Items of all heads, of one head, and of one row of the grid."""
    per_row = triton.cdiv(width, 2 * SIDE.value)
    tiles = triton.cdiv(height, SIDE.value) * per_row
    return batch * heads * tiles, tiles, per_row
