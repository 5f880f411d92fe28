"""Backward pass of linear attention in the quadratic order, for Hopper: cheaper if tokens are few.

With a_ij = phi(q_i) . phi(k_j), p_ij = do_i . v_j, z = sum_j phi(k_j), t_i = sum_j p_ij phi(k_j),
w_i = s / (s phi(q_i) . z + eps) and c_i = w_i^2 phi(q_i) . t_i, which is w_i do_i . o_i:

ratio: dphi(q_i) = w_i t_i - c_i z, dphi(k_j) = sum_i (w_i p_ij - c_i) phi(q_i),
    dv_j = sum_i w_i a_ij do_i
none: the same with w_i = s and c_i = 0

so that each gradient is a sum (a b^T) c, as the output is: of a = do, b = v, c = phi(k) for dq, of
phi(k), phi(q), do for dv and of v, do, phi(q) for dk. The first product, in its final form, is
rounded to bfloat16 for the second. A program owns a tile of a and passes tiles of b and c by it, in
the manner of `hopper_quadratic.py`. One launch gives dq, w and c; one dk and dv, whose programs
follow each other, so that tiles of queries and their gradients come from the L2 cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from .._common.boxes import Box
from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div, copy_engine_takes, empty
from .._common.plans import Memo, Plans
from . import configs
from .hopper_blocks import (
    activate,
    add_values,
    advance,
    allocate,
    boxes_of,
    feature_grad,
    load,
    of_tokens,
    phi,
    scores,
    store,
    thread_barrier,
    wait_for,
    weigh,
)


@gluon.jit
def _sum_tokens(
    total, tile, left, WIDTH: gl.constexpr, STEP: gl.constexpr, ROWS: gl.constexpr,
    WARPS: gl.constexpr, FEATURE: gl.constexpr,
):  # fmt: skip
    """Adds to each row of `total` some of the tile, of which `left` exist; ROWS is such that a
    thread keeps its sums to itself."""
    LANES: gl.constexpr = min(32, WIDTH // 2)
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [STEP // ROWS, 2], [32 // LANES, LANES], [WARPS, 1], [1, 0]
    )
    x = tile.load(LAYOUT).to(gl.float32)
    if FEATURE == "elu1":
        # Tokens beyond the last are zero elsewhere: phi(0) = 0.
        o_n = gl.arange(0, STEP, gl.SliceLayout(1, LAYOUT))
        x = gl.where((o_n < left)[:, None], x, 0.0)
    x = gl.sum(gl.reshape(x, [ROWS, STEP // ROWS, WIDTH]), 1)
    return total + gl.convert_layout(x, total.type.layout)


@gluon.jit
def _no_sums(WIDTH: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    LANES: gl.constexpr = min(32, WIDTH // 2)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    return gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)


@gluon.jit
def _finish_query(
    x0_s, x1_s, z0_s, z1_s, y0, y1, z0, z1, p_w, p_c, first, num_queries, scale, eps,
    D1: gl.constexpr, BLOCK: gl.constexpr, L0: gl.constexpr, L1: gl.constexpr,
    FEATURE: gl.constexpr,
):  # fmt: skip
    """w and c of the own queries x from the finished t = y and the sums z; makes t dphi(q)."""
    # All warps have read the rings, where z may lie.
    thread_barrier()
    z0_s.store(gl.sum(z0, 0))
    if D1 > 0:
        z1_s.store(gl.sum(z1, 0))
    thread_barrier()
    f0 = phi(x0_s.load(L0), FEATURE)
    total = gl.sum(f0 * z0_s.load(gl.SliceLayout(0, L0))[None, :], 1)
    through = gl.sum(f0 * y0, 1)
    if D1 > 0:
        f1 = phi(x1_s.load(L1), FEATURE)
        more = gl.sum(f1 * z1_s.load(gl.SliceLayout(0, L1))[None, :], 1)
        total += gl.convert_layout(more, gl.SliceLayout(1, L0))
        through += gl.convert_layout(gl.sum(f1 * y1, 1), gl.SliceLayout(1, L0))
    o_m = first + gl.arange(0, BLOCK, gl.SliceLayout(1, L0))
    w = gl.where(o_m < num_queries, scale / (scale * total + eps), 0.0)
    c = w * (w * through)
    gl.store(p_w + o_m, w)
    gl.store(p_c + o_m, c)
    # Beyond the barrier x and z are read again: registers would not hold them beside t.
    thread_barrier()
    y0 = y0 * w[:, None] - c[:, None] * z0_s.load(gl.SliceLayout(0, L0))[None, :]
    if D1 > 0:
        w = gl.convert_layout(w, gl.SliceLayout(1, L1))
        c = gl.convert_layout(c, gl.SliceLayout(1, L1))
        y1 = y1 * w[:, None] - c[:, None] * z1_s.load(gl.SliceLayout(0, L1))[None, :]
    return y0, y1


@gluon.jit
def _gradient(
    a0_d, a1_d, b0_d, b1_d, c0_d, c1_d, x0_d, x1_d, out0_d, out1_d, p_w, p_c,
    own, b_ring, c_ring, batch, head, first, num_queries, num_others, scale, eps,
    WHICH: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    FEATURE: gl.constexpr, RATIO: gl.constexpr,
    BLOCK: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out = (a b^T, weighed) c of BLOCK own tokens, through the feature map of x. `num_others` is
    the length of b and c."""
    DTYPE: gl.constexpr = a0_d.dtype
    WARPS: gl.constexpr = BLOCK // 16
    # phi belongs to a and b for dv, to c for the other two.
    FEATURES_FIRST: gl.constexpr = WHICH == "dv"
    WEIGHED: gl.constexpr = RATIO and WHICH != "dq"
    LESS: gl.constexpr = RATIO and WHICH == "dk"
    SUMS: gl.constexpr = RATIO and WHICH == "dq"
    OWN_FEATURE: gl.constexpr = WHICH != "dv" and (SUMS or FEATURE != "identity")
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, STEP, 16])
    L0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D0, 16])
    L1: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D1, 16]) if D1 > 0 else None
    )
    ROWS0: gl.constexpr = min(STEP, max(1, 64 // D0) * WARPS)
    ROWS1: gl.constexpr = min(STEP, max(1, 64 // max(D1, 16)) * WARPS)
    a0_s, a1_s, a_full = own[0].index(0), own[1].index(0), own[2].index(0)
    b0_s, b1_s, b_full = b_ring
    c0_s, c1_s, c_full = c_ring
    y0, y1, z0, z1 = gl.zeros([BLOCK, D0], gl.float32, L0), 0.0, 0.0, 0.0
    if D1 > 0:
        y1 = gl.zeros([BLOCK, D1], gl.float32, L1)
    if SUMS:
        z0 = _no_sums(D0, ROWS0, WARPS)
        if D1 > 0:
            z1 = _no_sums(D1, ROWS1, WARPS)
    w, c = 0.0, 0.0

    count = (num_others + STEP - 1) // STEP
    load(a0_d, a1_d, a0_s, a1_s, a_full, batch, head, first, 0, True, D0, D1)
    for i in gl.static_range(STAGES):
        load(
            b0_d, b1_d, b0_s.index(i), b1_s.index(i), b_full.index(i),
            batch, head, i * STEP, 0, i < count, D0, D1,
        )  # fmt: skip
        load(
            c0_d, c1_d, c0_s.index(i), c1_s.index(i), c_full.index(i),
            batch, head, i * STEP, 0, i < count, D0, D1,
        )  # fmt: skip

    none = gl.zeros([BLOCK, STEP], gl.float32, S_LAYOUT)
    if WEIGHED:
        w = of_tokens(p_w, STEP, WARPS)
        c = of_tokens(p_c, STEP, WARPS)
    mbarrier.wait(a_full, 0)
    mbarrier.wait(b_full.index(0), 0)
    if FEATURES_FIRST:
        activate(a0_s, a1_s, D, D0, D1, WARPS, FEATURE)
        activate(b0_s.index(0), b1_s.index(0), D, D0, D1, WARPS, FEATURE)
    s = scores(a0_s, a1_s, b0_s.index(0), b1_s.index(0), none, D1)
    if not FEATURES_FIRST:
        mbarrier.wait(c_full.index(0), 0)
        activate(c0_s.index(0), c1_s.index(0), D, D0, D1, WARPS, FEATURE)
        if SUMS:
            z0 = _sum_tokens(z0, c0_s.index(0), num_others, D0, STEP, ROWS0, WARPS, FEATURE)
            if D1 > 0:
                z1 = _sum_tokens(z1, c1_s.index(0), num_others, D1, STEP, ROWS1, WARPS, FEATURE)
    s = warpgroup_mma_wait(0, deps=[s])
    if count > STAGES:
        thread_barrier()
        load(
            b0_d, b1_d, b0_s.index(0), b1_s.index(0), b_full.index(0),
            batch, head, STAGES * STEP, 0, True, D0, D1,
        )  # fmt: skip

    slot, phase = 0, 0
    for t in range(1, count):
        s = weigh(s, w, c, WEIGHED, LESS)
        if FEATURES_FIRST:
            mbarrier.wait(c_full.index(slot), phase)
        y0, y1 = add_values(s, c0_s.index(slot), c1_s.index(slot), y0, y1, L0, L1, DTYPE)
        old = slot
        slot, phase = advance(slot, phase, STAGES)
        if WEIGHED:
            w = of_tokens(p_w + t * STEP, STEP, WARPS)
            c = of_tokens(p_c + t * STEP, STEP, WARPS)
        b0, b1 = b0_s.index(slot), b1_s.index(slot)
        mbarrier.wait(b_full.index(slot), phase)
        if FEATURES_FIRST:
            activate(b0, b1, D, D0, D1, WARPS, FEATURE)
        s = scores(a0_s, a1_s, b0, b1, none, D1)
        if not FEATURES_FIRST:
            c0, c1 = c0_s.index(slot), c1_s.index(slot)
            mbarrier.wait(c_full.index(slot), phase)
            activate(c0, c1, D, D0, D1, WARPS, FEATURE)
            if SUMS:
                left = num_others - t * STEP
                z0 = _sum_tokens(z0, c0, left, D0, STEP, ROWS0, WARPS, FEATURE)
                if D1 > 0:
                    z1 = _sum_tokens(z1, c1, left, D1, STEP, ROWS1, WARPS, FEATURE)
        y0, y1 = wait_for(y0, y1, D1 > 0)
        s = warpgroup_mma_wait(0, deps=[s])
        token = (t - 1 + STAGES) * STEP
        if token < num_others:
            # All warps have read c of the tile before, and b of this one.
            thread_barrier()
            load(
                c0_d, c1_d, c0_s.index(old), c1_s.index(old), c_full.index(old),
                batch, head, token, 0, True, D0, D1,
            )  # fmt: skip
            load(
                b0_d, b1_d, b0, b1, b_full.index(slot),
                batch, head, token + STEP, 0, token + STEP < num_others, D0, D1,
            )  # fmt: skip

    # Nobody reads a any more: x takes its place, and the gradient that of x.
    thread_barrier()
    if OWN_FEATURE:
        load(x0_d, x1_d, a0_s, a1_s, a_full, batch, head, first, 0, True, D0, D1)
    s = weigh(s, w, c, WEIGHED, LESS)
    if FEATURES_FIRST:
        mbarrier.wait(c_full.index(slot), phase)
    y0, y1 = add_values(s, c0_s.index(slot), c1_s.index(slot), y0, y1, L0, L1, DTYPE)
    y0, y1 = wait_for(y0, y1, D1 > 0)
    if OWN_FEATURE:
        mbarrier.wait(a_full, 1)
    if SUMS:
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        z0_s = gl.allocate_shared_memory(gl.float32, [D0], PLAIN)
        z1_s = z0_s
        if D1 > 0:
            z1_s = gl.allocate_shared_memory(gl.float32, [D1], PLAIN)
        y0, y1 = _finish_query(
            a0_s, a1_s, z0_s, z1_s, y0, y1, z0, z1, p_w, p_c, first, num_queries, scale, eps,
            D1, BLOCK, L0, L1, FEATURE,
        )  # fmt: skip
    if not RATIO:
        y0 *= scale
        if D1 > 0:
            y1 *= scale
    if OWN_FEATURE:
        y0 = feature_grad(a0_s.load(L0), y0, FEATURE)
        if D1 > 0:
            y1 = feature_grad(a1_s.load(L1), y1, FEATURE)
    store(out0_d, [batch, head, first, 0], a0_s, y0)
    if D1 > 0:
        store(out1_d, [batch, head, first, D0], a1_s, y1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "tiles", "heads", "scale", "eps"])
def _linear_attention_bwd_quadratic_queries_hopper_kernel(
    do0_d, do1_d, q0_d, q1_d, k0_d, k1_d, v0_d, v1_d, dq0_d, dq1_d, p_w, p_c,
    num_queries, num_keys, tiles, heads, scale, eps,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    FEATURE: gl.constexpr, RATIO: gl.constexpr,
    BLOCK: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq, and for ratio w and c of (B * H, tiles * BLOCK), zero for queries that do not exist.
    Grid (B * H * tiles of BLOCK queries)."""
    DTYPE: gl.constexpr = q0_d.dtype
    own = allocate(DTYPE, 1, BLOCK, D0, D1)
    b_ring = allocate(DTYPE, STAGES, STEP, D0, D1)
    c_ring = allocate(DTYPE, STAGES, STEP, D0, D1)
    thread_barrier()
    row = gl.program_id(0) // tiles
    first = gl.program_id(0) % tiles * BLOCK
    p_w += row.to(gl.int64) * tiles * BLOCK
    p_c += row.to(gl.int64) * tiles * BLOCK
    _gradient(
        do0_d, do1_d, v0_d, v1_d, k0_d, k1_d, q0_d, q1_d, dq0_d, dq1_d, p_w, p_c,
        own, b_ring, c_ring, row // heads, row % heads, first, num_queries, num_keys, scale, eps,
        "dq", D, D0, D1, FEATURE, RATIO, BLOCK, STEP, STAGES,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_queries", "tiles", "steps", "heads", "scale"])
def _linear_attention_bwd_quadratic_keys_hopper_kernel(
    do0_d, do1_d, q0_d, q1_d, k0_d, k1_d, v0_d, v1_d, dk0_d, dk1_d, dv0_d, dv1_d, p_w, p_c,
    num_queries, tiles, steps, heads, scale,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    FEATURE: gl.constexpr, RATIO: gl.constexpr,
    BLOCK: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dv (even programs) and dk (odd ones). Grid (B * H * tiles of BLOCK keys * 2); w and c are of
    (B * H, steps * STEP)."""
    DTYPE: gl.constexpr = q0_d.dtype
    own = allocate(DTYPE, 1, BLOCK, D0, D1)
    b_ring = allocate(DTYPE, STAGES, STEP, D0, D1)
    c_ring = allocate(DTYPE, STAGES, STEP, D0, D1)
    thread_barrier()
    tile = gl.program_id(0) // 2
    row = tile // tiles
    first = tile % tiles * BLOCK
    p_w += row.to(gl.int64) * steps * STEP
    p_c += row.to(gl.int64) * steps * STEP
    if gl.program_id(0) % 2 == 0:
        _gradient(
            k0_d, k1_d, q0_d, q1_d, do0_d, do1_d, k0_d, k1_d, dv0_d, dv1_d, p_w, p_c,
            own, b_ring, c_ring, row // heads, row % heads, first,
            num_queries, num_queries, scale, 0.0,
            "dv", D, D0, D1, FEATURE, RATIO, BLOCK, STEP, STAGES,
        )  # fmt: skip
    else:
        _gradient(
            v0_d, v1_d, do0_d, do1_d, q0_d, q1_d, k0_d, k1_d, dk0_d, dk1_d, p_w, p_c,
            own, b_ring, c_ring, row // heads, row % heads, first,
            num_queries, num_queries, scale, 0.0,
            "dk", D, D0, D1, FEATURE, RATIO, BLOCK, STEP, STAGES,
        )  # fmt: skip


def _boxes(
    tensors: Sequence[Tensor], rows: Sequence[int], parts: tuple[int, int]
) -> list[tuple[int, Box]]:
    return [
        (index, box)
        for index, (tensor, count) in enumerate(zip(tensors, rows, strict=True))
        for box in boxes_of(tensor, count, *parts)
    ]


class _Plan(NamedTuple):
    """Numbers a token that both kernels share, ``(B * H, columns)`` twice, and the kernels."""

    scratch: tuple[int, int]
    queries: KernelCall
    keys: KernelCall


def _plan(
    tensors: tuple[Tensor, ...], feature_map: str, normalizer: str, scale: float, eps: float
) -> _Plan:
    inputs, grads = tensors[:4], tensors[4:]
    _, query, key, _ = inputs
    batch, num_queries, heads, head_dim = query.shape
    rows, num_keys = batch * heads, key.shape[1]
    options = {"D": head_dim, "FEATURE": feature_map, "RATIO": normalizer == "ratio"}

    def constants(launch: configs.Launch, parts: tuple[int, int]) -> dict[str, object]:
        sizes = {"BLOCK": launch.block, "STEP": launch.step, "STAGES": launch.stages}
        warps = {"num_warps": launch.block // 16}
        return {"D0": parts[0], "D1": parts[1], **sizes, **warps, **options}

    name = "bwd_quadratic_hopper_queries"
    launch = configs.launch_of(name, query, head_dim)
    parts = configs.parts_of(head_dim, "d", name, query.dtype)
    own, other = launch.block, launch.step
    tiles = ceil_div(num_queries, own)
    # Whole tiles, so that the kernel for keys reads without a mask.
    columns = tiles * own
    queries = KernelCall(
        _linear_attention_bwd_quadratic_queries_hopper_kernel, (rows * tiles,),
        (num_queries, num_keys, tiles, heads, scale, eps), constants(launch, parts),
        _boxes((*inputs, grads[0]), (own, own, other, other, own), parts), only_boxes=5,
    )  # fmt: skip

    name = "bwd_quadratic_hopper_keys"
    launch = configs.launch_of(name, query, head_dim)
    parts = configs.parts_of(head_dim, "d", name, query.dtype)
    own, other = launch.block, launch.step
    tiles, steps = ceil_div(num_keys, own), columns // other
    keys = KernelCall(
        _linear_attention_bwd_quadratic_keys_hopper_kernel, (rows * tiles * 2,),
        (num_queries, tiles, steps, heads, scale), constants(launch, parts),
        _boxes((*inputs, *grads[1:]), (other, other, own, own, own, own), parts), only_boxes=6,
    )  # fmt: skip
    return _Plan((rows, columns), queries, keys)


_PLANS = Plans(_plan)


def backward_quadratic_hopper(
    inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...],
    feature_map: str, normalizer: str, scale: float, eps: float, memo: Memo | None = None,
) -> None:  # fmt: skip
    """Fills `grads`, those of query, key and value, from `inputs`: d_out, query, key and value. No
    covariance, bfloat16 and as many value as head channels only, in multiples of 8."""
    # A plan knows strides but not addresses, and the gradient of a sum repeats one number.
    inputs = tuple(
        x if copy_engine_takes(x) else x.clone(memory_format=torch.contiguous_format)
        for x in inputs
    )
    plan = _PLANS((*inputs, *grads), feature_map, normalizer, scale, eps, memo=memo)
    like = inputs[1]
    weights, offsets = (empty(*plan.scratch, like=like, dtype=torch.float32) for _ in "wc")
    plan.queries(*inputs, grads[0], weights, offsets)
    plan.keys(*inputs, *grads[1:], weights, offsets)
