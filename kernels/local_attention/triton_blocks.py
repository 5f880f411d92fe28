"""Pieces of the local-attention kernels: which tiles a disc touches, loads, masks.

Legend: T prefix tokens, then the image row-major on the grid; M extra keys. A program owns one tile
of tokens, OWN_Y x OWN_X of the grid or as many prefix tokens, and visits tiles of others: tokens in
a row of the sequence ("dense"), or rectangles OTHER_Y x OTHER_X of the grid. The disc is symmetric,
so queries that visit keys and keys that visit queries see the same tiles.
"""

import triton
import triton.language as tl


@triton.jit
def integer_root(number):
    """Largest integer whose square is at most `number`."""
    root = tl.sqrt(number.to(tl.float32)).to(tl.int32)
    root = tl.where(root * root > number, root - 1, root)
    return tl.where((root + 1) * (root + 1) <= number, root + 1, root)


@triton.jit
def tile_rows(y, height, limit, OWN_Y: tl.constexpr, OTHER_Y: tl.constexpr):
    """First and last row of tiles that discs around the rows y to y + OWN_Y - 1 touch."""
    reach = integer_root(limit - 1)
    first = tl.maximum(y - reach, 0) // OTHER_Y
    last = tl.minimum(y + (OWN_Y - 1) + reach, height - 1) // OTHER_Y
    return first, last


@triton.jit
def tile_columns(
    row, y, x, width, limit,
    OWN_Y: tl.constexpr, OWN_X: tl.constexpr, OTHER_Y: tl.constexpr, OTHER_X: tl.constexpr,
):  # fmt: skip
    """First and last tile in a row of tiles: as wide as the disc is at the nearest rows."""
    gap = tl.maximum(row * OTHER_Y - (y + (OWN_Y - 1)), y - (row * OTHER_Y + (OTHER_Y - 1)))
    gap = tl.maximum(gap, 0)
    reach = integer_root(tl.maximum(limit - 1 - gap * gap, 0))
    first = tl.maximum(x - reach, 0) // OTHER_X
    last = tl.minimum(x + (OWN_X - 1) + reach, width - 1) // OTHER_X
    return first, last


@triton.jit
def count_tiles(
    first_row, last_row, y, x, width, limit,
    OWN_Y: tl.constexpr, OWN_X: tl.constexpr, OTHER_Y: tl.constexpr, OTHER_X: tl.constexpr,
):  # fmt: skip
    count = 0
    for row in range(first_row, last_row + 1):
        first, last = tile_columns(row, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X)
        count += last - first + 1
    return count


@triton.jit
def next_tile(
    row, column, last, y, x, width, limit,
    OWN_Y: tl.constexpr, OWN_X: tl.constexpr, OTHER_Y: tl.constexpr, OTHER_X: tl.constexpr,
):  # fmt: skip
    """Row, column and last column of the tile after this one; one flat loop can be pipelined."""
    first, new_last = tile_columns(
        row + 1, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X
    )  # fmt: skip
    done = column == last
    return (
        tl.where(done, row + 1, row),
        tl.where(done, first, column + 1),
        tl.where(done, new_last, last),
    )


@triton.jit
def places(row, column, Y: tl.constexpr, X: tl.constexpr):
    """Coordinates on the grid of the tokens of a tile."""
    o = tl.arange(0, Y * X)
    return row * Y + o // X, column * X + o % X


@triton.jit
def far_outside(place, side):
    """Coordinates with those off the grid moved out of every disc, without a mask of their own.

    For sides up to 16384: every limit stays below 23200^2, every square below 2^31.
    """
    return tl.where(place < side, place, place + 23200)


@triton.jit
def in_disc(own_y, own_x, other_y, other_x, limit):
    """(dy^2 + dx^2 < limit), written so that one comparison is left for each pair."""
    dy = own_y - other_y
    dx = own_x - other_x
    return dy * dy < limit - dx * dx


@triton.jit
def load_tokens(
    p, rows, mask, stride, C: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """(tokens, BLOCK_C): the C channels of tokens `rows`, zeros elsewhere."""
    o_c = tl.arange(0, BLOCK_C)
    pointers = p + rows.to(tl.int64)[:, None] * stride + o_c[None, :]
    mask = mask[:, None]
    if C < BLOCK_C:
        mask = mask & (o_c < C)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tokens(p, rows, mask, stride, values, C: tl.constexpr, BLOCK_C: tl.constexpr):
    o_c = tl.arange(0, BLOCK_C)
    pointers = p + rows.to(tl.int64)[:, None] * stride + o_c[None, :]
    mask = mask[:, None]
    if C < BLOCK_C:
        mask = mask & (o_c < C)[None, :]
    tl.store(pointers, values.to(p.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b):
    """a b with float32 sums; float32 operands keep all their digits."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def own_tokens(
    program, tiles, num_prefix, height, width,
    IMAGE: tl.constexpr, OWN_Y: tl.constexpr, OWN_X: tl.constexpr,
):  # fmt: skip
    """Sequence rows, which of them exist, and the corner on the grid of a program's tile.

    IMAGE: tile `program` of the grid, row by row; else prefix tokens.
    """
    if IMAGE:
        per_row = tl.cdiv(width, OWN_X)
        y, x = (program // per_row) * OWN_Y, (program % per_row) * OWN_X
        own_y, own_x = places(program // per_row, program % per_row, OWN_Y, OWN_X)
        rows = num_prefix + own_y * width + own_x
        mask = (own_y < height) & (own_x < width)
    else:
        y, x = 0, 0
        rows = program * (OWN_Y * OWN_X) + tl.arange(0, OWN_Y * OWN_X)
        mask = rows < num_prefix
    return rows, mask, y, x
