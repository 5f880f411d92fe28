"""Depthwise token convolution: the kernel of the gradients of weights and bias."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div, device_guard, empty, unit_last
from .._common.plans import Plans
from . import configs
from .triton_blocks import lanes_of, load_row, widened
from .triton_fwd import token_stride


@triton.jit(
    do_not_specialize=[
        "batch", "groups", "height", "width", "channels", "prefix", "blocks", "tiles",
        "rows_per_program", "g_sb", "x_sb",
    ]
)  # fmt: skip
def _token_conv2d_bwd_weight_kernel(
    p_g, p_x, p_part, batch, groups, height, width, channels, prefix,
    blocks, tiles, rows_per_program, g_sb, x_sb,
    G_SN: tl.constexpr, X_SN: tl.constexpr,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dw[dy, dx] = sum g[y, x] t[y + dy - P, x + dx - P], db = sum g. Grid as in the forward
    kernel, with lanes over (groups, channels): a lane sums the samples group, group + groups, ...
    into part (ranges * tiles, groups, SIZE^2 + 1, C); the SIZE rows of g that a row of tokens
    meets wait in registers."""
    PAD: tl.constexpr = SIZE // 2
    TAPS: tl.constexpr = SIZE * SIZE
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    left = (rest % tiles) * COLUMNS
    first = (rest // tiles) * rows_per_program
    last = tl.minimum(first + rows_per_program, height)
    start = tl.maximum(first - PAD, 0)
    stop = tl.minimum(last + PAD, height)
    group, o_c = lanes_of(block.to(tl.int64) * LANES, channels, LANES, VECTOR)
    m_g = group < groups
    bias = tl.zeros((LANES,), tl.float32)
    taps = ()
    for _ in tl.static_range(TAPS):
        taps = taps + (tl.zeros((LANES,), tl.float32),)  # noqa: RUF005
    for sample in range(0, batch, groups):
        o_b = group + sample
        m_l = m_g & (o_b < batch)
        p_gs = p_g + o_b * (tl.cast(g_sb, tl.int64) * VECTOR) + o_c + prefix * G_SN
        p_xs = p_x + o_b * (tl.cast(x_sb, tl.int64) * VECTOR) + o_c + prefix * X_SN
        # waiting[i] is row y - PAD + i of g, the last one new.
        waiting = ()
        for i in tl.static_range(SIZE - 1):
            g = widened(
                load_row(p_gs, start - PAD + i, first, last, left, width, m_l, G_SN, 0, COLUMNS)
            )
            for j in tl.static_range(COLUMNS):
                bias += g[j]
            waiting = waiting + g
        g_row = load_row(p_gs, start + PAD, first, last, left, width, m_l, G_SN, 0, COLUMNS)
        x_row = load_row(p_xs, start, 0, stop, left, width, m_l, X_SN, PAD, COLUMNS)
        for y in range(start, stop):
            g_next = load_row(
                p_gs, y + 1 + PAD, first, last, left, width, m_l, G_SN, 0, COLUMNS
            )  # fmt: skip
            x_next = load_row(p_xs, y + 1, 0, stop, left, width, m_l, X_SN, PAD, COLUMNS)
            g = widened(g_row)
            x = widened(x_row)
            for j in tl.static_range(COLUMNS):
                bias += g[j]
            waiting = waiting + g
            # Sums that do not wait for each other side by side.
            for j in tl.static_range(COLUMNS):
                sums = ()
                for dy in tl.static_range(SIZE):
                    for dx in tl.static_range(SIZE):
                        product = x[j + dx] * waiting[(SIZE - 1 - dy) * COLUMNS + j]
                        sums = sums + (taps[dy * SIZE + dx] + product,)  # noqa: RUF005
                taps = sums
            waiting = waiting[COLUMNS:]
            g_row = g_next
            x_row = x_next
    p_part += (rest * groups.to(tl.int64) + group) * ((TAPS + 1) * channels) + o_c
    for tap in tl.static_range(TAPS):
        tl.store(p_part + tap * channels, taps[tap], mask=m_g)
    tl.store(p_part + TAPS * channels, bias, mask=m_g)


@triton.jit(do_not_specialize=["rows", "channels", "filters"])
def _token_conv2d_bwd_reduce_kernel(
    p_part, p_weight, p_bias, rows, channels, filters,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of filters, TAPS + 1): part (rows, TAPS + 1, C) summed, always in the same
    order, over rows and over channels that share a filter, into weight (F, TAPS) and bias (F)."""
    tap = tl.program_id(1)
    o_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < filters
    sums = tl.zeros((BLOCK, BLOCK_F), tl.float32)
    for head in range(0, channels, filters):
        p_head = p_part + tap * channels + head + o_f
        for row in range(0, rows, BLOCK):
            o_r = row + tl.arange(0, BLOCK)
            o_p = o_r.to(tl.int64) * ((TAPS + 1) * channels)
            mask = (o_r < rows)[:, None] & m_f[None, :]
            sums += tl.load(p_head[None, :] + o_p[:, None], mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    if tap < TAPS:
        tl.store(p_weight + o_f * TAPS + tap, total, mask=m_f)
    else:
        tl.store(p_bias + o_f, total, mask=m_f)


def _plan_reduce(tensors: tuple[Tensor], filters: int) -> KernelCall:
    rows, taps, channels = tensors[0].shape
    block = configs.REDUCE_FILTERS
    constants = {
        "TAPS": taps - 1, "BLOCK": configs.REDUCE_ROWS, "BLOCK_F": block, "num_warps": 8,
    }  # fmt: skip
    grid = (ceil_div(filters, block), taps)
    return KernelCall(_token_conv2d_bwd_reduce_kernel, grid, (rows, channels, filters), constants)


_REDUCE_PLANS = Plans(_plan_reduce)


def _reduce(part: Tensor, filters: int, size: int) -> tuple[Tensor, Tensor]:
    """Gradients of one kernel for all samples, from part (rows, k * k + 1, C)."""
    weight = empty(filters, size, size, like=part)
    bias = empty(filters, like=part)
    call = _REDUCE_PLANS((part,), filters)
    with device_guard(part):
        call(part, weight, bias)
    return weight, bias


def _plan(
    tensors: tuple[Tensor, Tensor], size: int, per_sample: bool,
    prefix: int, height: int, width: int,
) -> tuple[tuple[int, ...], KernelCall]:  # fmt: skip
    """The shape of the partial sums, and the launch that writes them."""
    d_out, tokens = (unit_last(x) for x in tensors)
    batch, _, channels = tokens.shape
    launch = configs.launch_of("conv_bwd_weight", tokens, size)
    columns = configs.columns_of(launch, width)
    tiles = ceil_div(width, columns)
    slots = configs.slots_of(launch, tokens)
    groups = batch
    if not per_sample:
        groups = configs.groups_of(slots, channels * tiles / launch.lanes, batch)
    blocks = ceil_div(groups * channels, launch.lanes)
    rows = configs.rows_of(slots, blocks * tiles, height, size)
    parts = tiles * ceil_div(height, rows)
    g_sb, g_sn, x_sb, x_sn = (
        d_out.stride(0), token_stride(d_out), tokens.stride(0), token_stride(tokens),
    )  # fmt: skip
    vector = math.gcd(launch.vector, channels, g_sb, g_sn, x_sb, x_sn)
    numbers = (
        batch, groups, height, width, channels, prefix, blocks, tiles, rows,
        g_sb // vector, x_sb // vector,
    )  # fmt: skip
    constants = {
        "G_SN": g_sn, "X_SN": x_sn,
        "SIZE": size, "COLUMNS": columns, "LANES": launch.lanes, "VECTOR": vector,
        "num_warps": launch.warps, **launch.options,
    }  # fmt: skip
    call = KernelCall(_token_conv2d_bwd_weight_kernel, (blocks * parts,), numbers, constants)
    return (parts, groups, size * size + 1, channels), call


_PLANS = Plans(_plan)


def token_conv2d_bwd_weight(
    d_out: Tensor, tokens: Tensor, filters: int, size: int, per_sample: bool,
    prefix: int, height: int, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of weight, (F, k, k) or (B, F, k, k), and bias (F), both in float32."""
    shape, call = _PLANS((d_out, tokens), size, per_sample, prefix, height, width)
    part = empty(*shape, like=tokens, dtype=torch.float32)
    if tokens.numel() > 0:
        with device_guard(tokens):
            call(unit_last(d_out), unit_last(tokens), part)
    if not per_sample:
        return _reduce(part.flatten(0, 1), filters, size)
    # Fixed order: PyTorch's sums over whole dimensions use no atomics.
    sums = part.sum(0).unflatten(-1, (-1, filters)).sum(-2)  # (B, k * k + 1, F)
    weight = sums[:, :-1].transpose(1, 2).unflatten(-1, (size, size))
    return weight.contiguous(), sums[:, -1].sum(0)
