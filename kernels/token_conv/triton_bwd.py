"""Depthwise token convolution: the kernel of the gradients of weights and bias."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.launch import device_guard, empty, unit_last
from . import configs
from .triton_fwd import tile_mask


@triton.jit
def _sum_columns(x, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, WARPS: tl.constexpr):
    """(WARPS, BLOCK_C): sums over the columns that one warp holds, so that none must be moved."""
    return tl.sum(tl.reshape(x, (BLOCK_X // WARPS, WARPS, BLOCK_C)), 0)


@triton.jit(
    do_not_specialize=[
        "height", "width", "channels", "rows_per_program", "g_sb", "g_sn", "x_sb", "x_sn",
    ]
)  # fmt: skip
def _token_conv2d_bwd_weight_kernel(
    p_g, p_x, p_part, height, width, channels, rows_per_program, g_sb, g_sn, x_sb, x_sn,
    SIZE: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr,
    WHOLE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """dw[dy, dx] = sum g[y, x] t[y + dy - P, x + dx - P], db = sum g. Grid (blocks of channels,
    ranges of rows, B): a program sums over its rows of g into part (B, ranges, SIZE^2 + 1, C); the
    SIZE rows of g that a row of tokens meets wait in registers."""
    PAD: tl.constexpr = SIZE // 2
    batch = tl.program_id(2).to(tl.int64)
    # As in the forward kernel: accesses of VECTOR channels, no wider.
    g_sn = (g_sn * VECTOR).to(tl.int64)
    x_sn = (x_sn * VECTOR).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, height)
    p_g += batch * g_sb * VECTOR
    p_x += batch * x_sb * VECTOR
    sums = ()
    for _ in tl.static_range(SIZE * SIZE + 1):
        sums = sums + (tl.zeros((WARPS, BLOCK_C), tl.float32),)  # noqa: RUF005
    for left in range(0, width, BLOCK_X):
        o_x = left + tl.arange(0, BLOCK_X)
        waiting = ()
        for _ in tl.static_range(SIZE):
            waiting = waiting + (tl.zeros((BLOCK_X, BLOCK_C), tl.float32),)  # noqa: RUF005
        for y in range(first - PAD, last + PAD):
            # waiting[i] is row y - PAD + i of g, the last one new.
            y_new = y + PAD
            m_new = tile_mask((y_new < last) & (o_x < width), m_c, WHOLE)
            p_new = p_g + y_new * (width * g_sn)
            g = tl.load(p_new + o_x[:, None] * g_sn + o_c[None, :], mask=m_new, other=0.0)
            g = g.to(tl.float32)
            waiting = waiting[1:] + (g,)  # noqa: RUF005
            last_sum = sums[SIZE * SIZE] + _sum_columns(g, BLOCK_X, BLOCK_C, WARPS)
            m_y = (y >= 0) & (y < height)
            p_row = p_x + y * (width * x_sn)
            rows = ()
            for dx in tl.static_range(SIZE):
                o_in = o_x + (dx - PAD)
                mask = tile_mask(m_y & (o_in >= 0) & (o_in < width), m_c, WHOLE)
                x = tl.load(p_row + o_in[:, None] * x_sn + o_c[None, :], mask=mask, other=0.0)
                rows = rows + (x.to(tl.float32),)  # noqa: RUF005
            added = ()
            for dy in tl.static_range(SIZE):
                for dx in tl.static_range(SIZE):
                    product = rows[dx] * waiting[SIZE - 1 - dy]
                    part = _sum_columns(product, BLOCK_X, BLOCK_C, WARPS)
                    added = added + (sums[dy * SIZE + dx] + part,)  # noqa: RUF005
            sums = added + (last_sum,)  # noqa: RUF005
    p_part += (batch * tl.num_programs(1) + tl.program_id(1)) * (SIZE * SIZE + 1) * channels
    for tap in tl.static_range(SIZE * SIZE + 1):
        tl.store(p_part + tap * channels + o_c, tl.sum(sums[tap], 0), mask=m_c)


def token_conv2d_bwd_weight(
    d_out: Tensor, tokens: Tensor, size: int, per_sample: bool, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Gradients of weight, (C, k, k) or (B, C, k, k), and bias (C), both in float32."""
    batch, _, channels = tokens.shape
    d_out, tokens = unit_last(d_out), unit_last(tokens)
    launch = configs.launch_of("conv_bwd_weight", tokens, size)
    programs = triton.cdiv(channels, launch.channels)
    rows = configs.rows_of(launch, programs * batch, height, tokens)
    ranges = triton.cdiv(height, rows)
    taps = size * size + 1
    strides = [*d_out.stride()[:2], *tokens.stride()[:2]]
    vector = math.gcd(launch.vector, channels, *strides)
    part = empty(batch, ranges, taps, channels, like=tokens, dtype=torch.float32)
    if part.numel() > 0:
        with device_guard(tokens):
            _token_conv2d_bwd_weight_kernel[(programs, ranges, batch)](
                d_out, tokens, part, height, width, channels, rows,
                *(stride // vector for stride in strides),
                SIZE=size, BLOCK_X=launch.columns, BLOCK_C=launch.channels, VECTOR=vector,
                WHOLE=channels % launch.channels == 0, WARPS=launch.warps,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
    # Fixed order: PyTorch's sums over whole dimensions use no atomics.
    per_batch = part.sum(1)  # (B, k * k + 1, C)
    total = per_batch.sum(0)
    kernels = (per_batch if per_sample else total)[..., :-1, :].transpose(-1, -2)
    return kernels.unflatten(-1, (size, size)).contiguous(), total[-1].clone()
