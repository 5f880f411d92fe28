"""The sweep over tokens that leaves a state, for Hopper and heads too wide for `triton_state.py`.

A program sums S^T = sum_j v_j x_j^T over a range of tokens for 128 columns of the values and all
channels of the keys: the widest piece that the registers of eight warps hold, so that the keys are
read as few times as possible: what bounds it is the way from the L2 cache. The copy engine (TMA)
brings tiles of both into a ring of shared memory; what lies outside a tensor arrives as zeros. Four
warps make x = w phi(k) in place and add it to their sums z, while for the eight others the tensor
cores read both operands of the tile before from shared memory.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div
from . import configs
from .hopper_blocks import (
    advance,
    allocate,
    boxes_of,
    copy,
    feature,
    thread_barrier,
    tile_layout,
    tile_rows,
)

# Value columns of a program; sixteen of them, as rows of a matrix instruction, belong to a warp.
_COLUMNS = 128


@gluon.jit
def _no_sums(WIDTH: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    return gl.zeros([ROWS, WIDTH], gl.float32, tile_layout(WIDTH, WARPS))


@gluon.jit
def _of_tokens(p, token, stop, WIDTH: gl.constexpr, STEP: gl.constexpr):
    """A number for each token of a tile, as `feature` lays out its rows; 0 beyond the last."""
    o_n = token + gl.arange(0, STEP, gl.SliceLayout(1, tile_layout(WIDTH, 4)))
    return gl.load(p + o_n, mask=o_n < stop, other=0.0)


@gluon.jit
def _prepare(
    tile, z, weight, gain, token, stop, first,
    D: gl.constexpr, WIDTH: gl.constexpr, STEP: gl.constexpr, ROWS: gl.constexpr,
    FEATURE: gl.constexpr, WEIGHTED: gl.constexpr, SUM_K: gl.constexpr,
):  # fmt: skip
    """x = w phi(k) of a tile, in place; z + g x, in which a thread keeps its sums to itself."""
    if WEIGHTED or SUM_K or FEATURE != "identity":
        x = feature(tile, first, D, WIDTH, 4, FEATURE)
        if WEIGHTED:
            x = (x.to(gl.float32) * weight[:, None]).to(tile.dtype)
        elif FEATURE == "elu1":
            # phi(0) is not 0: tokens beyond the last count in z.
            o_n = token + gl.arange(0, STEP, gl.SliceLayout(1, x.type.layout))
            x = gl.where((o_n < stop)[:, None], x, 0.0)
        tile.store(x)
        if SUM_K:
            y = x.to(gl.float32)
            if WEIGHTED:
                y *= gain[:, None]
            y = gl.sum(gl.reshape(y, [STEP // ROWS, ROWS, WIDTH]), 0)
            z += gl.convert_layout(y, z.type.layout)
    return z


@gluon.jit
def _store(p, count, first, y, D: gl.constexpr, WIDTH: gl.constexpr):
    """`count` rows of D numbers, or all of y's, of which y has the columns from `first` on."""
    LAYOUT: gl.constexpr = y.type.layout
    o_e = gl.arange(0, y.shape[0], gl.SliceLayout(1, LAYOUT))
    o_d = first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    mask = (o_e < count)[:, None] & (o_d < D)[None, :]
    gl.store(p + o_e[:, None] * D + o_d[None, :], y.to(p.dtype.element_ty), mask=mask)


@gluon.jit
def _store_sums(p, first, z, D: gl.constexpr, WIDTH: gl.constexpr):
    z = gl.sum(z, 0)
    o_d = first + gl.arange(0, WIDTH, z.type.layout)
    gl.store(p + o_d, z, mask=o_d < D)


@gluon.jit
def _load(
    k0_d, k1_d, v_d, k0_s, k1_s, v_s, barrier, slot, batch, head, token, column, pred,
    D0: gl.constexpr, D1: gl.constexpr,
):  # fmt: skip
    """Starts the copies of a tile of keys and of its piece of the values."""
    nbytes: gl.constexpr = k0_d.block_type.nbytes + v_d.block_type.nbytes
    mbarrier.expect(barrier, nbytes + (k1_d.block_type.nbytes if D1 > 0 else 0), pred)
    copy(k0_d, [batch, head, token, 0], barrier, k0_s.index(slot), pred)
    if D1 > 0:
        copy(k1_d, [batch, head, token, D0], barrier, k1_s.index(slot), pred)
    copy(v_d, [batch, head, token, column], barrier, v_s.index(slot), pred)


@gluon.jit
def _activate(
    k0_s, k1_s, full, ready, p_weight, p_gain, p_z, start, stop, block,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    FEATURE: gl.constexpr, WEIGHTED: gl.constexpr, SUM_K: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps that make x of the keys, and z."""
    ROWS0: gl.constexpr = tile_rows(D0, 4, STEP)
    ROWS1: gl.constexpr = tile_rows(max(D1, 16), 4, STEP)
    z0, z1 = 0.0, 0.0
    if SUM_K:
        z0 = _no_sums(D0, ROWS0, 4)
        if D1 > 0:
            z1 = _no_sums(D1, ROWS1, 4)
    # Weights and gains, a tile ahead of their use.
    w0, w1, g0, g1 = 0.0, 0.0, 0.0, 0.0
    if WEIGHTED:
        w0 = _of_tokens(p_weight, start, stop, D0, STEP)
        g0 = _of_tokens(p_gain, start, stop, D0, STEP)
        if D1 > 0:
            w1 = _of_tokens(p_weight, start, stop, D1, STEP)
            g1 = _of_tokens(p_gain, start, stop, D1, STEP)
    slot, phase = 0, 0
    for token in range(start, stop, STEP):
        mbarrier.wait(full.index(slot), phase)
        old_w0, old_w1, old_g0, old_g1 = w0, w1, g0, g1
        if WEIGHTED:
            w0 = _of_tokens(p_weight, token + STEP, stop, D0, STEP)
            g0 = _of_tokens(p_gain, token + STEP, stop, D0, STEP)
            if D1 > 0:
                w1 = _of_tokens(p_weight, token + STEP, stop, D1, STEP)
                g1 = _of_tokens(p_gain, token + STEP, stop, D1, STEP)
        z0 = _prepare(
            k0_s.index(slot), z0, old_w0, old_g0, token, stop, 0,
            D, D0, STEP, ROWS0, FEATURE, WEIGHTED, SUM_K,
        )  # fmt: skip
        if D1 > 0:
            z1 = _prepare(
                k1_s.index(slot), z1, old_w1, old_g1, token, stop, D0,
                D, D1, STEP, ROWS1, FEATURE, WEIGHTED, SUM_K,
            )  # fmt: skip
        fence_async_shared()
        mbarrier.arrive(ready.index(slot))
        slot, phase = advance(slot, phase, STAGES)
    if SUM_K:  # noqa: SIM102 - the first is known when compiling, the second when running
        if block == 0:
            _store_sums(p_z, 0, z0, D, D0)
            if D1 > 0:
                _store_sums(p_z, D0, z1, D, D1)


@gluon.jit
def _sum(
    k0_d, k1_d, v_d, k0_s, k1_s, v_s, full, ready, p_s,
    batch, head, start, stop, column, rows, factor,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, EB: gl.constexpr,
    FINAL: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warps that keep the state, sixteen value columns each, and bring the tiles."""
    WARPS: gl.constexpr = EB // 16
    L0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D0, 16])
    L1: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D1, 16]) if D1 > 0 else None
    )
    s0, s1 = gl.zeros([EB, D0], gl.float32, L0), 0.0
    if D1 > 0:
        s1 = gl.zeros([EB, D1], gl.float32, L1)
    slot, phase, old = 0, 0, 0
    for token in range(start, stop, STEP):
        mbarrier.wait(full.index(slot), phase)
        mbarrier.wait(ready.index(slot), phase)
        values = v_s.index(slot).permute((1, 0))
        s0 = warpgroup_mma(values, k0_s.index(slot), s0, is_async=True)
        if D1 > 0:
            s1 = warpgroup_mma(values, k1_s.index(slot), s1, is_async=True)
            s0, s1 = warpgroup_mma_wait(2, deps=[s0, s1])
        else:
            s0 = warpgroup_mma_wait(1, deps=[s0])
        # All have summed the tile before: another takes its place.
        thread_barrier()
        ahead = token + (STAGES - 1) * STEP
        if (token > start) & (ahead < stop):
            _load(
                k0_d, k1_d, v_d, k0_s, k1_s, v_s, full.index(old), old,
                batch, head, ahead, column, True, D0, D1,
            )  # fmt: skip
        old = slot
        slot, phase = advance(slot, phase, STAGES)
    if D1 > 0:
        s0, s1 = warpgroup_mma_wait(0, deps=[s0, s1])
    else:
        s0 = warpgroup_mma_wait(0, deps=[s0])
    if FINAL:
        s0 *= factor
        if D1 > 0:
            s1 *= factor
    _store(p_s, rows, 0, s0, D, D0)
    if D1 > 0:
        _store(p_s, rows, D0, s1, D, D1)


@gluon.jit(do_not_specialize=["num_tokens", "tokens_per_split", "heads", "factor"])
def _linear_attention_fwd_moments_hopper_kernel(
    k0_d, k1_d, v_d, p_weight, p_gain, p_s, p_z, num_tokens, tokens_per_split, heads, factor,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, E: gl.constexpr, EB: gl.constexpr,
    FEATURE: gl.constexpr, WEIGHTED: gl.constexpr, SUM_K: gl.constexpr, FINAL: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid (B * H * blocks of EB value columns, splits); the results of the kernel in
    `triton_state.py`: partial sums in float32, or the finished state if FINAL; the first block
    writes z. STAGES > 1."""
    DTYPE: gl.constexpr = v_d.dtype
    BLOCKS: gl.constexpr = (E + EB - 1) // EB
    k0_s, k1_s, full = allocate(DTYPE, STAGES, STEP, D0, D1)
    v_s, _, ready = allocate(DTYPE, STAGES, STEP, EB, 0)
    thread_barrier()

    row = gl.program_id(0) // BLOCKS
    block = gl.program_id(0) % BLOCKS
    batch, head = row // heads, row % heads
    part = (gl.program_id(1) * (gl.num_programs(0) // BLOCKS) + row).to(gl.int64)
    p_weight += row.to(gl.int64) * num_tokens
    p_gain += row.to(gl.int64) * num_tokens
    p_s += (part * E + block * EB) * D
    p_z += part * D
    start = gl.program_id(1) * tokens_per_split
    stop = gl.minimum(start + tokens_per_split, num_tokens)
    for i in gl.static_range(STAGES):
        token = start + i * STEP
        _load(
            k0_d, k1_d, v_d, k0_s, k1_s, v_s, full.index(i), i,
            batch, head, token, block * EB, token < stop, D0, D1,
        )  # fmt: skip
    gl.warp_specialize(
        [
            (_activate, (
                k0_s, k1_s, full, ready, p_weight, p_gain, p_z, start, stop, block,
                D, D0, D1, FEATURE, WEIGHTED, SUM_K, STEP, STAGES,
            )),
            (_sum, (
                k0_d, k1_d, v_d, k0_s, k1_s, v_s, full, ready, p_s,
                batch, head, start, stop, block * EB, E - block * EB, factor,
                D, D0, D1, EB, FINAL, STEP, STAGES,
            )),
        ],
        [EB // 16],
        [176],
    )  # fmt: skip


def plan_state_hopper(
    key: Tensor, value: Tensor, factor: float, feature_map: str, weighted: bool, sum_k: bool
) -> tuple[int, KernelCall]:
    """The number of splits, and the launch that sums each: of keys, values, weights, gains, states
    and rows z."""
    batch, tokens, heads, head_dim = key.shape
    value_dim = value.shape[3]
    launch = configs.launch_of("fwd_moments_hopper", key, head_dim)
    parts = configs.parts_of(head_dim, "d", "fwd_moments_hopper", key.dtype)
    programs = batch * heads * ceil_div(value_dim, _COLUMNS)
    splits, share = configs.even_splits_of(tokens, programs, key, launch.block, cost=3)
    boxes = [
        *((0, box) for box in boxes_of(key, launch.block, *parts)),
        *((1, box) for box in boxes_of(value, launch.block, _COLUMNS)),
    ]
    constants = {
        "D": head_dim, "D0": parts[0], "D1": parts[1], "E": value_dim, "EB": _COLUMNS,
        "FEATURE": feature_map, "WEIGHTED": weighted, "SUM_K": sum_k, "FINAL": splits == 1,
        "STEP": launch.block, "STAGES": launch.stages, "num_warps": launch.warps,
    }  # fmt: skip
    return splits, KernelCall(
        _linear_attention_fwd_moments_hopper_kernel, (programs, splits),
        (tokens, share, heads, factor), constants, boxes, only_boxes=2,
    )  # fmt: skip
