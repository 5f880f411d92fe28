"""Depthwise token convolution: the kernel of the output and of the gradient of the tokens."""

import math

import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div, device_guard, empty, unit_last
from .._common.plans import Memo, Plans
from . import configs
from .triton_blocks import lanes_of, load_row, widened


@triton.jit
def _store_row(
    p_o, row, added, left, width, m_l,
    STRIDE: tl.constexpr, RESIDUAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    for j in tl.static_range(COLUMNS):
        out = row[j]
        if RESIDUAL:
            out += added[j].to(tl.float32)
        tl.store(p_o + j * STRIDE, out.to(p_o.dtype.element_ty), mask=m_l & (left + j < width))


@triton.jit(
    do_not_specialize=[
        "batch", "height", "width", "channels", "filters", "prefix", "blocks", "tiles",
        "rows_per_program", "biased", "w_first", "x_sb", "w_sb", "r_sb",
    ]
)  # fmt: skip
def _token_conv2d_fwd_kernel(
    p_x, p_weight, p_bias, p_residual, p_o, batch, height, width, channels, filters, prefix,
    blocks, tiles, rows_per_program, biased, w_first, x_sb, w_sb, w_sf, w_st, r_sb,
    X_SN: tl.constexpr, R_SN: tl.constexpr, O_SN: tl.constexpr,
    SIZE: tl.constexpr, RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """o[y, x] = r[y, x] + b + sum w[dy, dx] x[y + dy - P, x + dx - P]; prefix tokens are r alone.
    Grid (ranges of rows * tiles of columns * blocks of lanes): a program walks down its rows; each
    input row is read once and added to the SIZE output rows it belongs to, which wait in
    registers. The next row is on its way meanwhile."""
    PAD: tl.constexpr = SIZE // 2
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    left = (rest % tiles) * COLUMNS
    first = (rest // tiles) * rows_per_program
    last = tl.minimum(first + rows_per_program, height)
    o_b, o_c = lanes_of(block.to(tl.int64) * LANES, channels, LANES, VECTOR)
    m_l = o_b < batch
    # Strides of samples are given in multiples of VECTOR, so that the compiler knows them aligned.
    p_x += o_b * (tl.cast(x_sb, tl.int64) * VECTOR) + o_c + prefix * X_SN
    p_residual += o_b * (tl.cast(r_sb, tl.int64) * VECTOR) + o_c + prefix * R_SN
    p_o += o_b * ((prefix + height * width).to(tl.int64) * O_SN) + o_c + prefix * O_SN
    o_f = tl.max_contiguous(tl.multiple_of(o_c % filters, VECTOR), VECTOR)
    p_weight += o_b * w_sb + o_f * w_sf + w_first
    taps = ()
    for tap in tl.static_range(SIZE * SIZE):
        weight = tl.load(p_weight + tap * w_st, mask=m_l, other=0.0)
        taps = taps + (weight.to(tl.float32),)  # noqa: RUF005 - Triton knows no starred tuples
    bias = tl.load(p_bias + o_f, mask=m_l & (biased > 0), other=0.0).to(tl.float32)

    start = tl.maximum(first - PAD, 0)
    stop = tl.minimum(last + PAD, height)
    waiting = ()
    for _ in tl.static_range(SIZE * COLUMNS):
        waiting = waiting + (bias,)  # noqa: RUF005
    row = load_row(p_x, start, 0, stop, left, width, m_l, X_SN, PAD, COLUMNS)
    for y in range(start, stop):
        following = load_row(p_x, y + 1, 0, stop, left, width, m_l, X_SN, PAD, COLUMNS)
        done = y - PAD
        if RESIDUAL:
            added = load_row(p_residual, done, first, last, left, width, m_l, R_SN, 0, COLUMNS)
        else:
            added = row
        wide = widened(row)
        # Sums that do not wait for each other side by side.
        sums = waiting
        for dx in tl.static_range(SIZE):
            more = ()
            for i in tl.static_range(SIZE):
                for j in tl.static_range(COLUMNS):
                    product = wide[j + dx] * taps[(SIZE - 1 - i) * SIZE + dx]
                    more = more + (sums[i * COLUMNS + j] + product,)  # noqa: RUF005
            sums = more
        if done >= first:
            p_done = p_o + (done * width + left).to(tl.int64) * O_SN
            _store_row(p_done, sums, added, left, width, m_l, O_SN, RESIDUAL, COLUMNS)
        waiting = sums[COLUMNS:]
        for _ in tl.static_range(COLUMNS):
            waiting = waiting + (bias,)  # noqa: RUF005
        row = following
    # Rows whose last neighbours would lie below the grid.
    for i in tl.static_range(PAD):
        done = stop - PAD + i
        if (done >= first) & (done < last):
            if RESIDUAL:
                added = load_row(p_residual, done, first, last, left, width, m_l, R_SN, 0, COLUMNS)
            else:
                added = row
            p_done = p_o + (done * width + left).to(tl.int64) * O_SN
            sums = waiting[i * COLUMNS : (i + 1) * COLUMNS]
            _store_row(p_done, sums, added, left, width, m_l, O_SN, RESIDUAL, COLUMNS)
    if (left == 0) & (first == 0):
        for token in range(-prefix, 0):
            out = tl.zeros((LANES,), tl.float32)
            if RESIDUAL:
                out += tl.load(p_residual + token * R_SN, mask=m_l, other=0.0).to(tl.float32)
            tl.store(p_o + token * O_SN, out.to(p_o.dtype.element_ty), mask=m_l)


def token_stride(tokens: Tensor) -> int:
    """Stride between tokens; where there is one token only, it may be anything."""
    return tokens.stride(1) if tokens.shape[1] > 1 else tokens.shape[2]


def taps_of(weight: Tensor) -> Tensor:
    """The weights as the kernel reads them: see `_tap_strides`."""
    if weight.ndim == 4 or weight.shape[2] < 5:
        return weight.contiguous()
    # Neighbouring channels side by side: else each of the many loads touches many cache lines.
    return weight.permute(1, 2, 0).contiguous()


def _tap_strides(weight: Tensor) -> tuple[int, int, int]:
    """Strides of `taps_of` between samples, filters and taps."""
    filters, size = weight.shape[-3], weight.shape[-1]
    if weight.ndim == 4:
        return filters * size * size, size * size, 1
    return (0, size * size, 1) if size < 5 else (0, 1, filters)


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    prefix: int, height: int, width: int, flipped: bool,
) -> KernelCall:  # fmt: skip
    tokens, weight, bias, residual = tensors
    tokens = unit_last(tokens)
    residual = None if residual is None else unit_last(residual)
    batch, _, channels = tokens.shape
    filters, size = weight.shape[-3], weight.shape[-1]
    launch = configs.launch_of("conv_fwd", tokens, size)
    columns = configs.columns_of(launch, width)
    tiles = ceil_div(width, columns)
    blocks = ceil_div(batch * channels, launch.lanes)
    rows = configs.rows_of(configs.slots_of(launch, tokens), blocks * tiles, height, size)
    x_sb, x_sn = tokens.stride(0), token_stride(tokens)
    r_sb, r_sn = (0, 0) if residual is None else (residual.stride(0), token_stride(residual))
    vector = math.gcd(launch.vector, channels, filters, x_sb, x_sn, r_sb, r_sn)
    w_sb, w_sf, w_st = _tap_strides(weight)
    w_first = 0
    if flipped:  # from the last tap backwards
        w_first, w_st = (size * size - 1) * w_st, -w_st
    numbers = (
        batch, height, width, channels, filters, prefix, blocks, tiles, rows,
        int(bias is not None), w_first, x_sb // vector, w_sb, w_sf, w_st, r_sb // vector,
    )  # fmt: skip
    constants = {
        "X_SN": x_sn, "R_SN": r_sn, "O_SN": channels,
        "SIZE": size, "RESIDUAL": residual is not None,
        "COLUMNS": columns, "LANES": launch.lanes, "VECTOR": vector,
        "num_warps": launch.warps, **launch.options,
    }  # fmt: skip
    grid = (blocks * tiles * ceil_div(height, rows),)
    return KernelCall(_token_conv2d_fwd_kernel, grid, numbers, constants)


PLANS = Plans(_plan)


def convolve(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    prefix: int, height: int, width: int,
    *, flipped: bool = False, memo: Memo | None = None,
) -> Tensor:  # fmt: skip
    """`api.token_conv2d` on checked tensors; with `flipped` weights, its transpose."""
    out = empty(*tokens.shape, like=tokens)
    if tokens.numel() == 0:
        return out
    call = PLANS((tokens, weight, bias, residual), prefix, height, width, flipped, memo=memo)
    tokens = unit_last(tokens)
    taps = taps_of(weight)
    with device_guard(tokens):
        call(
            tokens, taps, taps if bias is None else bias.contiguous(),
            tokens if residual is None else unit_last(residual), out,
        )  # fmt: skip
    return out


def token_conv2d_fwd(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    prefix: int, height: int, width: int, *, memo: Memo | None = None,
) -> Tensor:  # fmt: skip
    """The operation of `api.token_conv2d` on tensors that `api` has checked."""
    return convolve(tokens, weight, bias, residual, prefix, height, width, memo=memo)


def token_conv2d_bwd_tokens(
    d_out: Tensor, weight: Tensor, residual: Tensor | None, prefix: int, height: int, width: int
) -> Tensor:
    """Gradient of the tokens: the convolution of `d_out` with the flipped weights, on `residual`,
    what else there is of it."""
    return convolve(d_out, weight, None, residual, prefix, height, width, flipped=True)
