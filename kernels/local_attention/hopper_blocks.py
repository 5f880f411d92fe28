"""Pieces of the Hopper kernels of local attention: items, the ring of tiles, masks, descriptors.

A program keeps running and takes every n-th item: 8 x 16 tokens of the grid, of which two groups
of four warps own 8 x 8 each (or 2 x 64 tokens of a sequence). One more warp loads: tiles of 8 x 8
other tokens come through the copy engine (TMA) straight from the raster order into a ring of shared
memory, once for both groups; a group skips those its discs do not touch. Written in Gluon, since
Triton's own language does not specialise warps on this architecture.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .._common.boxes import Box
from .._common.launch import ceil_div
from .triton_blocks import tile_columns

SIDE = gl.constexpr(8)
TILE = gl.constexpr(64)
# As in `triton_blocks.far_outside`.
FAR = gl.constexpr(23200)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next place in the ring; `phase` turns with each round."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def sequence_of(item, tiles, together):
    """Sequence (batch and head) and number within it of an item. `together` heads are done at a
    time: their channels lie side by side, and memory likes long reads."""
    chunk, within = item // (tiles * together), item % (tiles * together)
    return chunk * together + within % together, within // together


@gluon.jit
def own_tile(number, group, height, width):
    """First row and column of a group's tile of an item, and whether there is one: the last item
    of a row may have one tile only, which the other group then does again in vain."""
    columns = (width + SIDE - 1) // SIDE
    per_row = (columns + 1) // 2
    row, column = number // per_row, number % per_row * 2 + group
    return row * SIDE, gl.minimum(column, columns - 1) * SIDE, column < columns


@gluon.jit
def columns_of(row, y, x, width, limit, WIDTH: gl.constexpr):
    """First and last tile in a row of tiles that discs around the 8 x WIDTH tokens at (y, x) touch:
    as wide as the disc is at the nearest rows."""
    return tile_columns(row, y, x, width, limit, SIDE, WIDTH, SIDE, SIDE)


@gluon.jit
def copy(desc, place, ring, full, slot):
    tma.async_copy_global_to_shared(
        desc, place, full.index(slot),
        ring.index(slot)._reinterpret(desc.dtype, desc.block_type.shape, desc.layout),
    )  # fmt: skip


@gluon.jit
def load_tile(a_desc, b_desc, a_s, b_s, full, empty, place, slot, phase):
    """Starts the copies of a tile of two tensors into `slot` once nobody reads it any more."""
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
    copy(a_desc, place, a_s, full, slot)
    copy(b_desc, place, b_s, full, slot)


@gluon.jit
def skip(full, empty, slot, phase, count, STAGES: gl.constexpr):
    """Passes tiles that only other groups need; the arrival keeps the rounds in step."""
    for _ in range(count):
        mbarrier.wait(full.index(slot), phase)
        mbarrier.arrive(empty.index(slot))
        slot, phase = advance(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def tokens_left(tile, prefix_tiles, num_prefix, num_extra):
    """How many tokens a dense tile and those after it in its run have."""
    is_prefix = tile < prefix_tiles
    count = gl.where(is_prefix, num_prefix, num_extra)
    return count - TILE * gl.where(is_prefix, tile, tile - prefix_tiles)


@gluon.jit
def in_disc(own_y, own_x, o_n, row, column, height, width, limit):
    """Which pairs see each other; tokens off the grid lie outside every disc."""
    other_y, other_x = row * SIDE + o_n // SIDE, column * SIDE + o_n % SIDE
    other_y = gl.where(other_y < height, other_y, other_y + FAR)
    other_x = gl.where(other_x < width, other_x, other_x + FAR)
    dy = own_y[:, None] - other_y[None, :]
    dx = own_x[:, None] - other_x[None, :]
    return dy * dy < limit - dx * dx


@gluon.jit
def store_tile(desc, place, staging, values):
    """Starts to write 8 x 8 tokens through shared memory."""
    staging.store(values.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(
        desc, place, staging._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    )  # fmt: skip


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


def grid_box(tensor: Tensor, first: int, height: int, width: int) -> Box:
    """Boxes of 8 x 8 tokens of (B, N, H, D), whose tokens from `first` on lie on the grid."""
    batch, _, heads, channels = tensor.shape
    s_b, s_n, s_h, _ = _strides(tensor)
    shape, strides = [batch, heads, height, width, channels], [s_b, s_h, width * s_n, s_n, 1]
    block = [1, 1, SIDE.value, SIDE.value, channels]
    return Box(shape, strides, block, gl.NVMMASharedLayout(128, 16, 5), first * s_n)


def dense_box(tensor: Tensor, count: int) -> Box:
    """Boxes of 64 of the first `count` tokens of (B, N, H, D)."""
    batch, _, heads, channels = tensor.shape
    s_b, s_n, s_h, _ = _strides(tensor)
    shape, strides = [batch, heads, max(count, 1), channels], [s_b, s_h, s_n, 1]
    layout = gl.NVMMASharedLayout(128, 16, 4)
    return Box(shape, strides, [1, 1, TILE.value, channels], layout)


def grid_descriptor(tensor: Tensor, first: int, height: int, width: int) -> TensorDescriptor:
    return grid_box(tensor, first, height, width).of(tensor)


def dense_descriptor(tensor: Tensor, count: int) -> TensorDescriptor:
    return dense_box(tensor, count).of(tensor)


def tiles_of(height: int, width: int) -> tuple[int, int]:
    """Tiles of 8 x 8 tokens of a grid, and items of two neighbours in a row."""
    rows, columns = ceil_div(height, SIDE.value), ceil_div(width, SIDE.value)
    return rows * columns, rows * ceil_div(columns, 2)
