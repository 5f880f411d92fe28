"""Pieces of the Hopper kernels of linear attention: tiles of shared memory, their feature map, the
copies and products that they take part in.

A head of D channels is held as two powers of two D0 + D1 >= D, as in `triton_blocks.py`; tiles of
an absent part are there in name only.
"""

from collections.abc import Sequence

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

from .._common.boxes import Box

# Triton 3.6 calls it thread_barrier.
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def allocate(
    DTYPE: gl.constexpr, PLACES: gl.constexpr, ROWS: gl.constexpr,
    D0: gl.constexpr, D1: gl.constexpr,
):  # fmt: skip
    """PLACES for both parts of a tile, and a barrier for each that tells when it is full."""
    LAYOUT0: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * D0), 16, 2)
    t0 = gl.allocate_shared_memory(DTYPE, [PLACES, ROWS, D0], LAYOUT0)
    t1 = t0
    if D1 > 0:
        LAYOUT1: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * D1), 16, 2)
        t1 = gl.allocate_shared_memory(DTYPE, [PLACES, ROWS, D1], LAYOUT1)
    return t0, t1, barriers(PLACES)


@gluon.jit
def barriers(PLACES: gl.constexpr):
    """One for each place, which one arrival completes."""
    result = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(result.index(i), count=1)
    return result


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next place in a ring; `phase` turns with each round."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.constexpr_function
def tile_layout(width, warps):
    """A tile of rows of `width` channels, eight a thread."""
    lanes = min(8, width // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def tile_rows(width, warps, most):
    """How many rows all warps hold together at a time, at most `most`."""
    return min(most, 32 // min(8, width // 8) * warps)


@gluon.jit
def feature(
    tile, first, D: gl.constexpr, WIDTH: gl.constexpr, WARPS: gl.constexpr, FEATURE: gl.constexpr
):
    """phi of a tile of shared memory; zero in the padding of the channels."""
    x = tile.load(tile_layout(WIDTH, WARPS))
    LAYOUT: gl.constexpr = x.type.layout
    if FEATURE == "relu":
        x = gl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.bf16x2 $0, $1, zero; }",
            "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    elif FEATURE != "identity":
        gl.static_assert(FEATURE == "elu1")
        wide = x.to(gl.float32)
        inside = (first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT)) < D)[None, :]
        x = gl.where(wide > 0, wide + 1, gl.exp(wide))
        x = gl.where(inside, x, 0.0).to(tile.dtype)
    return x


@gluon.jit
def activate(
    t0, t1, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    WARPS: gl.constexpr, FEATURE: gl.constexpr,
):  # fmt: skip
    """phi of both parts of a tile, in place, for the tensor cores to read."""
    if FEATURE != "identity":
        x0 = feature(t0, 0, D, D0, WARPS, FEATURE)
        if D1 > 0:
            t1.store(feature(t1, D0, D, D1, WARPS, FEATURE))
        t0.store(x0)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def copy(desc, place, barrier, tile, pred):
    shape: gl.constexpr = desc.block_type.shape
    tile = tile._reinterpret(desc.dtype, shape, desc.layout)
    tma.async_copy_global_to_shared(desc, place, barrier, tile, pred)


@gluon.jit
def load(
    d0, d1, t0, t1, barrier, batch, head, token, column, pred, W0: gl.constexpr, W1: gl.constexpr
):
    """Starts the copies of both parts of a tile, of the channels from `column` on."""
    if W1 > 0:
        mbarrier.expect(barrier, d0.block_type.nbytes + d1.block_type.nbytes, pred)
        copy(d1, [batch, head, token, column + W0], barrier, t1, pred)
    else:
        mbarrier.expect(barrier, d0.block_type.nbytes, pred)
    copy(d0, [batch, head, token, column], barrier, t0, pred)


@gluon.jit
def rows_times(x0, x1, m0, m1, none, K1: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Asks for x m, or x m^T."""
    if TRANSPOSED:
        m0 = m0.permute((1, 0))
    y = warpgroup_mma(x0, m0, none, use_acc=False, is_async=True)
    if K1 > 0:
        if TRANSPOSED:
            m1 = m1.permute((1, 0))
        y = warpgroup_mma(x1, m1, y, is_async=True)
    return y


@gluon.jit
def _load_part(desc, tile, barrier, row, n, k, TRANSPOSED: gl.constexpr):
    if TRANSPOSED:
        copy(desc, [row, n, k], barrier, tile, True)
    else:
        copy(desc, [row, k, n], barrier, tile, True)


@gluon.jit
def load_state(
    m00_d, m01_d, m10_d, m11_d, m00_s, m01_s, m10_s, m11_s, barrier, row, column,
    K0: gl.constexpr, K1: gl.constexpr, N0: gl.constexpr, N1: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Starts the copies of some columns of a state."""
    nbytes: gl.constexpr = 2 * (K0 + K1) * (N0 + N1)
    mbarrier.expect(barrier, nbytes, True)
    _load_part(m00_d, m00_s, barrier, row, column, 0, TRANSPOSED)
    if K1 > 0:
        _load_part(m01_d, m01_s, barrier, row, column, K0, TRANSPOSED)
    if N1 > 0:
        _load_part(m10_d, m10_s, barrier, row, column + N0, 0, TRANSPOSED)
        if K1 > 0:
            _load_part(m11_d, m11_s, barrier, row, column + N0, K0, TRANSPOSED)


@gluon.jit
def scores(a0, a1, b0, b1, none, D1: gl.constexpr):
    """Asks for a b^T."""
    s = warpgroup_mma(a0, b0.permute((1, 0)), none, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(a1, b1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def add_values(s, v0, v1, y0, y1, L0: gl.constexpr, L1: gl.constexpr, DTYPE: gl.constexpr):
    """Asks for y + s v; L0 and L1 are the layouts of y, L1 None if there is one part only."""
    s = s.to(DTYPE)
    weights = gl.convert_layout(s, gl.DotOperandLayout(0, L0, 2))
    y0 = warpgroup_mma(weights, v0, y0, is_async=True)
    if L1 is not None:
        weights = gl.convert_layout(s, gl.DotOperandLayout(0, L1, 2))
        y1 = warpgroup_mma(weights, v1, y1, is_async=True)
    return y0, y1


@gluon.jit
def wait_for(y0, y1, BOTH: gl.constexpr):
    if BOTH:
        y0, y1 = warpgroup_mma_wait(0, deps=[y0, y1])
    else:
        y0 = warpgroup_mma_wait(0, deps=[y0])
    return y0, y1


@gluon.jit
def store(desc, place, tile, values):
    """Starts to write a tile through shared memory."""
    tile.store(values.to(desc.dtype))
    fence_async_shared()
    thread_barrier()
    shape: gl.constexpr = desc.block_type.shape
    tma.async_copy_shared_to_global(desc, place, tile._reinterpret(desc.dtype, shape, desc.layout))


@gluon.jit
def phi(x, FEATURE: gl.constexpr):
    """phi as the tensor cores take it, in float32."""
    wide = x.to(gl.float32)
    if FEATURE == "relu":
        wide = gl.where(wide <= 0, 0.0, wide)
    elif FEATURE == "elu1":
        wide = gl.where(wide > 0, wide + 1, gl.exp(wide)).to(x.dtype).to(gl.float32)
    return wide


@gluon.jit
def feature_grad(x, d_phi, FEATURE: gl.constexpr):
    """Gradient of x in float32 from that of phi(x)."""
    if FEATURE == "relu":
        d_phi = gl.where(x > 0, d_phi, 0.0)
    elif FEATURE == "elu1":
        wide = x.to(gl.float32)
        d_phi = gl.where(wide > 0, d_phi, d_phi * gl.exp(wide))
    return d_phi


@gluon.jit
def of_tokens(p, STEP: gl.constexpr, WARPS: gl.constexpr):
    """One number a token. Each warp holds all of them, a lane two at most, so that they may wait
    for their use beside sums that take most registers."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([max(1, STEP // 32)], [32], [WARPS], [0])
    return gl.load(p + gl.arange(0, STEP, LAYOUT))


@gluon.jit
def weigh(s, w, c, WEIGHED: gl.constexpr, LESS: gl.constexpr):
    """s w - c, of the columns; s w unless LESS, s unless WEIGHED."""
    if WEIGHED:
        COLUMNS: gl.constexpr = gl.SliceLayout(0, s.type.layout)
        s = s * gl.convert_layout(w, COLUMNS)[None, :]
        if LESS:
            s = s - gl.convert_layout(c, COLUMNS)[None, :]
    return s


def boxes_of(tensor: Tensor, rows: int, *widths: int) -> list[Box]:
    """Boxes of `rows` tokens and each width of channels of (B, N, H, D); width 0 repeats the first.
    The copy engine wants a proper stride where a size of 1 has any."""
    batch, tokens, heads, channels = tensor.shape
    s_b, s_n, s_h = (
        stride if size > 1 else 8
        for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    )
    shape, strides = [batch, heads, tokens, channels], [s_b, s_h, s_n, 1]
    boxes = []
    for width in (x or widths[0] for x in widths):
        layout = gl.NVMMASharedLayout(min(128, 2 * width), 16, 4)
        boxes.append(Box(shape, strides, [1, 1, rows, width], layout))
    return boxes


def boxes_of_state(matrix: Tensor, rows: Sequence[int], columns: Sequence[int]) -> list[Box]:
    """Boxes of parts of (B * H, E, D); a size of 0 repeats the first."""
    layouts = [gl.NVMMASharedLayout(min(128, 2 * (c or columns[0])), 16, 3) for c in columns]
    return [
        Box(matrix.shape, matrix.stride(), [1, r or rows[0], c or columns[0]], layout)
        for r in rows
        for c, layout in zip(columns, layouts, strict=True)
    ]
