"""Depthwise token convolution: the kernel of the output and of the gradient of the tokens."""

import math

import triton
import triton.language as tl
from torch import Tensor

from .._common.launch import device_guard, empty, unit_last
from . import configs


@triton.jit
def tile_mask(m_x, m_c, WHOLE: tl.constexpr):
    """Mask of a tile; without that of channels, which would split its loads, where none is cut."""
    mask = m_x[:, None]
    if not WHOLE:
        mask = mask & m_c[None, :]
    return mask


@triton.jit
def load_taps(p_weight, o_c, m_c, SIZE: tl.constexpr, FLIPPED: tl.constexpr):
    """All SIZE * SIZE weights of a block of channels, in float32, row by row."""
    taps = ()
    for tap in tl.static_range(SIZE * SIZE):
        place = (SIZE * SIZE - 1 - tap) if FLIPPED else tap
        weight = tl.load(p_weight + o_c * (SIZE * SIZE) + place, mask=m_c, other=0.0)
        taps = taps + (weight.to(tl.float32),)  # noqa: RUF005 - Triton knows no starred tuples
    return taps


@triton.jit(
    do_not_specialize=[
        "height", "width", "channels", "rows_per_program", "x_sb", "x_sn", "w_sb", "r_sb", "r_sn",
    ]
)  # fmt: skip
def _token_conv2d_fwd_kernel(
    p_x, p_weight, p_bias, p_residual, p_o, height, width, channels, rows_per_program,
    x_sb, x_sn, w_sb, r_sb, r_sn,
    SIZE: tl.constexpr, BIASED: tl.constexpr, RESIDUAL: tl.constexpr, FLIPPED: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """o[y, x] = r[y, x] + b + sum w[dy, dx] x[y + dy - P, x + dx - P]. Grid (blocks of channels *
    tiles of columns, ranges of rows, B): a program walks down its rows; each input row is read
    once and added to the SIZE output rows it belongs to, which wait in registers."""
    PAD: tl.constexpr = SIZE // 2
    blocks = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    batch = tl.program_id(2).to(tl.int64)
    # Strides known as multiples of VECTOR and no more: accesses are that wide, and a thread keeps
    # the weights of so few channels that they fit in its registers.
    x_sn = (x_sn * VECTOR).to(tl.int64)
    r_sn = (r_sn * VECTOR).to(tl.int64)
    o_sn = ((channels // VECTOR) * VECTOR).to(tl.int64)
    o_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_x = (tl.program_id(0) // blocks) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_o = tile_mask(o_x < width, m_c, WHOLE)
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, height)
    p_x += batch * x_sb * VECTOR
    p_residual += batch * r_sb * VECTOR
    p_o += batch * height * width * o_sn
    taps = load_taps(p_weight + batch * w_sb, o_c, m_c, SIZE, FLIPPED)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if BIASED:
        bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)

    waiting = ()
    for _ in tl.static_range(SIZE):
        waiting = waiting + (tl.zeros((BLOCK_X, BLOCK_C), tl.float32),)  # noqa: RUF005
    for y in range(first - PAD, last + PAD):
        m_y = (y >= 0) & (y < height)
        p_row = p_x + y * (width * x_sn)
        for dx in tl.static_range(SIZE):
            o_in = o_x + (dx - PAD)
            mask = tile_mask(m_y & (o_in >= 0) & (o_in < width), m_c, WHOLE)
            x = tl.load(p_row + o_in[:, None] * x_sn + o_c[None, :], mask=mask, other=0.0)
            x = x.to(tl.float32)
            added = ()
            for row in tl.static_range(SIZE):
                tap = taps[(SIZE - 1 - row) * SIZE + dx]
                added = added + (waiting[row] + x * tap[None, :],)  # noqa: RUF005
            waiting = added
        done = y - PAD
        if done >= first:
            o_out = o_x[:, None] * o_sn + o_c[None, :]
            out = waiting[0] + bias[None, :]
            if RESIDUAL:
                p_r = p_residual + done * (width * r_sn)
                o_r = o_x[:, None] * r_sn + o_c[None, :]
                out += tl.load(p_r + o_r, mask=m_o, other=0.0).to(tl.float32)
            tl.store(p_o + done * (width * o_sn) + o_out, out.to(p_o.dtype.element_ty), mask=m_o)
        waiting = waiting[1:] + (tl.zeros((BLOCK_X, BLOCK_C), tl.float32),)  # noqa: RUF005


def convolve(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    height: int, width: int, *, flipped: bool = False,
) -> Tensor:  # fmt: skip
    """`api.token_conv2d` on checked tensors; with `flipped` weights, its transpose."""
    batch, num_tokens, channels = tokens.shape
    out = empty(batch, num_tokens, channels, like=tokens)
    if 0 in tokens.shape:
        return out
    tokens = unit_last(tokens)
    residual = None if residual is None else unit_last(residual)
    weight = weight.contiguous()
    size = weight.shape[-1]
    launch = configs.launch_of("conv_fwd", tokens, size)
    tiles = triton.cdiv(width, launch.columns)
    programs = triton.cdiv(channels, launch.channels) * tiles
    rows = configs.rows_of(launch, programs * batch, height, tokens)
    strides = [*tokens.stride()[:2], *(residual.stride()[:2] if residual is not None else (0, 0))]
    vector = math.gcd(launch.vector, channels, *strides)
    x_sb, x_sn, r_sb, r_sn = (stride // vector for stride in strides)
    with device_guard(tokens):
        _token_conv2d_fwd_kernel[(programs, triton.cdiv(height, rows), batch)](
            tokens, weight, weight if bias is None else bias.contiguous(),
            tokens if residual is None else residual, out, height, width, channels, rows,
            x_sb, x_sn, weight.stride(0) if weight.ndim == 4 else 0, r_sb, r_sn,
            SIZE=size, BIASED=bias is not None, RESIDUAL=residual is not None, FLIPPED=flipped,
            BLOCK_X=launch.columns, BLOCK_C=launch.channels, VECTOR=vector,
            WHOLE=channels % launch.channels == 0,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return out


def token_conv2d_fwd(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    height: int, width: int,
) -> Tensor:  # fmt: skip
    """The operation of `api.token_conv2d` on tensors that `api` has checked."""
    return convolve(tokens, weight, bias, residual, height, width)


def token_conv2d_bwd_tokens(d_out: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """Gradient of the tokens: the convolution of `d_out` with the flipped weights."""
    return convolve(d_out, weight, None, None, height, width, flipped=True)
