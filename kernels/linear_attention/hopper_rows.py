"""Rows of tokens times a state, for Hopper and heads too wide for one program to keep all of it.

out: o_i = g_i phi(q_i) S with g_i = s / (s phi(q_i) . z + eps), or g_i = s without a normaliser
dv:  dv_j = phi(k_j) dS
dk:  dk_j = phi'(k_j) (v_j dS^T + dz)

A program keeps all rows of a state for some of the results' columns in shared memory, and passes a
range of tokens by them, which the copy engine (TMA) brings. Some warps apply the feature map in
place; twice four others take turns with the tiles: the tensor cores read both operands from shared
memory, and while they work for one group the other finishes its tile, which leaves through shared
memory, where for dk the keys lie until then.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div
from .._common.plans import Memo, Plans
from . import configs
from .hopper_blocks import (
    advance,
    allocate,
    barriers,
    boxes_of,
    boxes_of_state,
    feature,
    feature_grad,
    load,
    load_state,
    rows_times,
    store,
    thread_barrier,
    tile_layout,
    wait_for,
)


@gluon.jit
def _row(p_row, first, D: gl.constexpr, WIDTH: gl.constexpr, WARPS: gl.constexpr):
    """Some channels of z, as `feature` lays out a tile."""
    o_d = first + gl.arange(0, WIDTH, gl.SliceLayout(0, tile_layout(WIDTH, WARPS)))
    return gl.load(p_row + o_d, mask=o_d < D, other=0.0)


@gluon.jit
def _dot(x, row):
    return gl.sum(x.to(gl.float32) * row[None, :], 1)


@gluon.jit
def _finish(
    y, w_s, p_row, gains, first, N: gl.constexpr, WIDTH: gl.constexpr,
    WHICH: gl.constexpr, FEATURE: gl.constexpr, RATIO: gl.constexpr,
):  # fmt: skip
    """The results of one part of the columns."""
    LAYOUT: gl.constexpr = y.type.layout
    if WHICH == "out":
        y = y * gl.convert_layout(gains, gl.SliceLayout(1, LAYOUT))[:, None]
    if WHICH == "dk":
        if RATIO:
            o_n = first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
            y = y + gl.load(p_row + o_n, mask=o_n < N, other=0.0)[None, :]
        if FEATURE != "identity":
            y = feature_grad(w_s.load(LAYOUT), y, FEATURE)
    return y


@gluon.jit
def _prepare(
    x0_s, x1_s, gains_s, full, ready, p_row, start, stop, scale, eps,
    K: gl.constexpr, K0: gl.constexpr, K1: gl.constexpr,
    FEATURE: gl.constexpr, GAINS: gl.constexpr, RATIO: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The warps that apply the feature map and find the gains."""
    ROWS: gl.constexpr = gl.SliceLayout(1, tile_layout(K0, WARPS))
    z0, z1 = 0.0, 0.0
    if RATIO:
        z0 = _row(p_row, 0, K, K0, WARPS)
        if K1 > 0:
            z1 = _row(p_row, K0, K, K1, WARPS)
    slot, phase = 0, 0
    for _ in range(start, stop, BLOCK):
        mbarrier.wait(full.index(slot), phase)
        total = gl.zeros([BLOCK], gl.float32, ROWS)
        if RATIO or FEATURE != "identity":
            x0 = feature(x0_s.index(slot), 0, K, K0, WARPS, FEATURE)
            x0_s.index(slot).store(x0)
            if RATIO:
                total += _dot(x0, z0)
            if K1 > 0:
                x1 = feature(x1_s.index(slot), K0, K, K1, WARPS, FEATURE)
                x1_s.index(slot).store(x1)
                if RATIO:
                    total += gl.convert_layout(_dot(x1, z1), ROWS)
        if GAINS:
            gains = total + scale
            if RATIO:
                gains = scale / (scale * total + eps)
            gains_s.index(slot).store(gains)
        fence_async_shared()
        mbarrier.arrive(ready.index(slot))
        slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _multiply(
    GROUP: gl.constexpr, K0: gl.constexpr, K1: gl.constexpr,
    N: gl.constexpr, N0: gl.constexpr, N1: gl.constexpr,
    WHICH: gl.constexpr, FEATURE: gl.constexpr, RATIO: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
    x0_d, x1_d, w0_d, w1_d, y0_d, y1_d,
    x0_s, x1_s, m00_s, m01_s, m10_s, m11_s, y0_s, y1_s, gains_s,
    m_full, w_full, full, ready, p_row, batch, head, start, stop, column,
):  # fmt: skip
    """Four warps that multiply every other tile by the state, finish it and bring another."""
    TRANSPOSED: gl.constexpr = WHICH != "dk"
    WITH_KEYS: gl.constexpr = WHICH == "dk" and FEATURE != "identity"
    L0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N0, 16])
    L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N1, 16]) if N1 > 0 else None
    y0_s, y1_s, w_full = y0_s.index(GROUP), y1_s.index(GROUP), w_full.index(GROUP)
    none0, none1 = gl.zeros([BLOCK, N0], gl.float32, L0), 0.0
    if N1 > 0:
        none1 = gl.zeros([BLOCK, N1], gl.float32, L1)
    slot, phase, w_phase = 0, 0, 0
    if GROUP == 1:
        slot, phase = advance(slot, phase, STAGES)
    mbarrier.wait(m_full, 0)
    for token in range(start + GROUP * BLOCK, stop, 2 * BLOCK):
        y1, gains = none1, 0.0
        # The tile before has left its place.
        tma.store_wait(0)
        if WITH_KEYS:
            load(w0_d, w1_d, y0_s, y1_s, w_full, batch, head, token, column, True, N0, N1)
        mbarrier.wait(full.index(slot), phase)
        mbarrier.wait(ready.index(slot), phase)
        y0 = rows_times(x0_s.index(slot), x1_s.index(slot), m00_s, m01_s, none0, K1, TRANSPOSED)
        if N1 > 0:
            y1 = rows_times(x0_s.index(slot), x1_s.index(slot), m10_s, m11_s, none1, K1, TRANSPOSED)
        if WHICH == "out":
            gains = gains_s.index(slot).load(gl.SliceLayout(1, L0))
        y0, y1 = wait_for(y0, y1, N1 > 0)
        thread_barrier()
        ahead = token + STAGES * BLOCK
        if ahead < stop:
            load(
                x0_d, x1_d, x0_s.index(slot), x1_s.index(slot), full.index(slot),
                batch, head, ahead, 0, True, K0, K1,
            )  # fmt: skip
        if WITH_KEYS:
            mbarrier.wait(w_full, w_phase)
            w_phase ^= 1
        y0 = _finish(y0, y0_s, p_row, gains, column, N, N0, WHICH, FEATURE, RATIO)
        store(y0_d, [batch, head, token, column], y0_s, y0)
        if N1 > 0:
            y1 = _finish(y1, y1_s, p_row, gains, column + N0, N, N1, WHICH, FEATURE, RATIO)
            store(y1_d, [batch, head, token, column + N0], y1_s, y1)
        for _ in gl.static_range(2):
            slot, phase = advance(slot, phase, STAGES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens", "tokens_per_program", "rows", "heads", "scale", "eps"])
def _linear_attention_rows_hopper_kernel(
    x0_d, x1_d, m00_d, m01_d, m10_d, m11_d, w0_d, w1_d, y0_d, y1_d, p_row,
    num_tokens, tokens_per_program, rows, heads, scale, eps,
    K: gl.constexpr, K0: gl.constexpr, K1: gl.constexpr,
    N: gl.constexpr, NB: gl.constexpr, N0: gl.constexpr, N1: gl.constexpr,
    WHICH: gl.constexpr, FEATURE: gl.constexpr, RATIO: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Rows of K numbers, x, give rows of N, y. Grid (ranges * B * H * blocks of NB columns).

    m00 to m11 are boxes of (part of N, part of K), for dk of (part of K, part of N). w are the keys
    whose gradient dk is. STAGES > 1.
    """
    DTYPE: gl.constexpr = x0_d.dtype
    BLOCKS: gl.constexpr = (N + NB - 1) // NB
    TRANSPOSED: gl.constexpr = WHICH != "dk"
    GAINS: gl.constexpr = WHICH == "out"
    DOTS: gl.constexpr = GAINS and RATIO
    X_FEATURE: gl.constexpr = "identity" if WHICH == "dk" else FEATURE
    x0_s, x1_s, full = allocate(DTYPE, STAGES, BLOCK, K0, K1)
    y0_s, y1_s, w_full = allocate(DTYPE, 2, BLOCK, N0, N1)
    if TRANSPOSED:
        m00_s, m01_s, m_full = allocate(DTYPE, 1, N0, K0, K1)
        m10_s, m11_s = m00_s, m01_s
        if N1 > 0:
            m10_s, m11_s, _ = allocate(DTYPE, 1, N1, K0, K1)
    else:
        m00_s, m10_s, m_full = allocate(DTYPE, 1, K0, N0, N1)
        m01_s, m11_s = m00_s, m10_s
        if K1 > 0:
            m01_s, m11_s, _ = allocate(DTYPE, 1, K1, N0, N1)
    ready = barriers(STAGES)
    gains_s = gl.allocate_shared_memory(
        gl.float32, [STAGES, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    thread_barrier()
    m00_s, m01_s, m10_s, m11_s = m00_s.index(0), m01_s.index(0), m10_s.index(0), m11_s.index(0)
    m_full = m_full.index(0)

    block = gl.program_id(0) % BLOCKS
    row = gl.program_id(0) // BLOCKS % rows
    batch, head = row // heads, row % heads
    start = gl.program_id(0) // BLOCKS // rows * tokens_per_program
    stop = gl.minimum(start + tokens_per_program, num_tokens)
    column = block * NB
    p_row += row.to(gl.int64) * (N if WHICH == "dk" else K)
    load_state(
        m00_d, m01_d, m10_d, m11_d, m00_s, m01_s, m10_s, m11_s, m_full, row, column,
        K0, K1, N0, N1, TRANSPOSED,
    )  # fmt: skip
    for i in gl.static_range(STAGES):
        token = start + i * BLOCK
        load(
            x0_d, x1_d, x0_s.index(i), x1_s.index(i), full.index(i),
            batch, head, token, 0, token < stop, K0, K1,
        )  # fmt: skip
    multiply = (
        x0_d, x1_d, w0_d, w1_d, y0_d, y1_d,
        x0_s, x1_s, m00_s, m01_s, m10_s, m11_s, y0_s, y1_s, gains_s,
        m_full, w_full, full, ready, p_row, batch, head, start, stop, column,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_prepare, (
                x0_s, x1_s, gains_s, full, ready, p_row, start, stop, scale, eps,
                K, K0, K1, X_FEATURE, GAINS, DOTS, BLOCK, STAGES, WARPS,
            )),
            # Triton knows no starred tuples.
            (_multiply, (0, K0, K1, N, N0, N1, WHICH, FEATURE, RATIO, BLOCK, STAGES) + multiply),  # noqa: RUF005
            (_multiply, (1, K0, K1, N, N0, N1, WHICH, FEATURE, RATIO, BLOCK, STAGES) + multiply),  # noqa: RUF005
        ],
        [4, 4],
        # As many as a thread has if all have alike.
        [168 if WARPS == 4 else 128, 168 if WARPS == 4 else 128],
    )  # fmt: skip


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    which: str, feature_map: str, ratio: bool, scale: float, eps: float,
) -> KernelCall:  # fmt: skip
    x, matrix, keys, y = tensors
    batch, tokens, heads, width = x.shape
    rows, num_columns = batch * heads, y.shape[3]
    columns, stages = configs.resident_columns(width, num_columns, x)
    k_parts = configs.parts_of(width, "k", "rows_hopper", x.dtype)
    n_parts = configs.parts_of(columns, "n", "rows_hopper", x.dtype)
    programs = rows * ceil_div(num_columns, columns)
    ranges, share = configs.even_splits_of(tokens, programs, x, configs.ROWS_BLOCK, cost=0)
    parts = (k_parts, n_parts) if which == "dk" else (n_parts, k_parts)
    state = boxes_of_state(matrix, *parts)
    if which == "dk":  # they come as parts of k first
        state[1], state[2] = state[2], state[1]
    warps = configs.rows_warps(which == "out" and ratio)
    boxes = [
        *((0, box) for box in boxes_of(x, configs.ROWS_BLOCK, *k_parts)),
        *((1, box) for box in state),
        *((2, box) for box in boxes_of(keys, configs.ROWS_BLOCK, *n_parts)),
        *((3, box) for box in boxes_of(y, configs.ROWS_BLOCK, *n_parts)),
    ]
    constants = {
        "K": width, "K0": k_parts[0], "K1": k_parts[1],
        "N": num_columns, "NB": columns, "N0": n_parts[0], "N1": n_parts[1],
        "WHICH": which, "FEATURE": feature_map, "RATIO": ratio,
        "BLOCK": configs.ROWS_BLOCK, "STAGES": stages, "WARPS": warps, "num_warps": warps,
    }  # fmt: skip
    return KernelCall(
        _linear_attention_rows_hopper_kernel, (programs * ranges,),
        (tokens, share, rows, heads, scale, eps), constants, boxes, only_boxes=4,
    )  # fmt: skip


_PLANS = Plans(_plan)


def rows_times_state_hopper(
    x: Tensor, matrix: Tensor, row: Tensor, y: Tensor, keys: Tensor,
    which: str, feature_map: str, ratio: bool, scale: float, eps: float,
    memo: Memo | None = None,
) -> None:  # fmt: skip
    """Fills y, ``(B, N, H, columns)``, from x ``(B, N, H, K)`` and the state `matrix`
    ``(B * H, E, D)`` with its `row`: z for ``out``, dz for ``dk``. `keys` matter to ``dk`` only."""
    call = _PLANS((x, matrix, keys, y), which, feature_map, ratio, scale, eps, memo=memo)
    call(x, matrix, keys, y, row)
