"""Token convolution: what the kernels share. Tensors are one-dimensional, a lane a channel.

The columns of a tile are the items of a tuple, so that a shift along the grid is another item and
no data moves. Strides between tokens are constants: a row's loads then share one address.
"""

import triton
import triton.language as tl


@triton.jit
def lanes_of(first, channels, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Sample (int64) and channel of the lanes `first`, `first` + 1, ... of (samples, channels)."""
    sample = first // channels
    place = (first - sample * channels).to(tl.int32) + tl.arange(0, LANES)
    over = place // channels
    # Samples change at multiples of VECTOR only, which the compiler cannot see.
    o_b = tl.max_constancy(sample + over, VECTOR)
    o_c = tl.max_contiguous(tl.multiple_of(place - over * channels, VECTOR), VECTOR)
    return o_b, o_c


@triton.jit
def load_row(
    p_x, y, low, high, left, width, m_l,
    STRIDE: tl.constexpr, HALO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns left - HALO ... left + COLUMNS + HALO - 1 of row y as a tuple in the input's dtype;
    zeros outside the grid and outside the rows low <= y < high."""
    row = ()
    p_row = p_x + (y * width + left).to(tl.int64) * STRIDE
    m_y = (y >= low) & (y < high)
    for j in tl.static_range(COLUMNS + 2 * HALO):
        x = left + (j - HALO)
        mask = m_l & (m_y & (x >= 0) & (x < width))
        row = row + (tl.load(p_row + (j - HALO) * STRIDE, mask=mask, other=0.0),)  # noqa: RUF005
    return row


@triton.jit
def widened(row):
    """The items of `row` in float32."""
    wide = ()
    for j in tl.static_range(len(row)):
        wide = wide + (row[j].to(tl.float32),)  # noqa: RUF005 - Triton knows no starred tuples
    return wide
