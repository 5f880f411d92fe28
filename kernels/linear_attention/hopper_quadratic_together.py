"""dk and dv of narrow heads in one program, in the quadratic order for Hopper.

A program owns a tile of keys and values and passes tiles of queries and their gradients by it; see
`hopper_quadratic_bwd.py` for how, and for wider heads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from .hopper_blocks import (
    activate,
    add_values,
    advance,
    allocate,
    feature_grad,
    load,
    of_tokens,
    scores,
    store,
    thread_barrier,
    wait_for,
    weigh,
)


@gluon.jit(do_not_specialize=["num_queries", "tiles", "steps", "heads", "scale"])
def linear_attention_bwd_quadratic_together_hopper_kernel(
    do0_d, do1_d, q0_d, q1_d, k0_d, k1_d, v0_d, v1_d, dk0_d, dk1_d, dv0_d, dv1_d, p_w, p_c,
    num_queries, tiles, steps, heads, scale,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    FEATURE: gl.constexpr, RATIO: gl.constexpr,
    BLOCK: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv. Grid (B * H * tiles of BLOCK keys); w and c are of (B * H, steps * STEP)."""
    DTYPE: gl.constexpr = q0_d.dtype
    WARPS: gl.constexpr = BLOCK // 16
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, STEP, 16])
    L0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D0, 16])
    L1: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D1, 16]) if D1 > 0 else None
    )
    k0_s, k1_s, k_full = allocate(DTYPE, 1, BLOCK, D0, D1)
    v0_s, v1_s, v_full = allocate(DTYPE, 1, BLOCK, D0, D1)
    q0_s, q1_s, q_full = allocate(DTYPE, STAGES, STEP, D0, D1)
    g0_s, g1_s, g_full = allocate(DTYPE, STAGES, STEP, D0, D1)
    thread_barrier()
    k0_s, k1_s, k_full = k0_s.index(0), k1_s.index(0), k_full.index(0)
    v0_s, v1_s, v_full = v0_s.index(0), v1_s.index(0), v_full.index(0)
    dk0, dk1 = gl.zeros([BLOCK, D0], gl.float32, L0), 0.0
    dv0, dv1 = gl.zeros([BLOCK, D0], gl.float32, L0), 0.0
    if D1 > 0:
        dk1 = gl.zeros([BLOCK, D1], gl.float32, L1)
        dv1 = gl.zeros([BLOCK, D1], gl.float32, L1)
    row = gl.program_id(0) // tiles
    first = gl.program_id(0) % tiles * BLOCK
    batch, head = row // heads, row % heads
    p_w += row.to(gl.int64) * steps * STEP
    p_c += row.to(gl.int64) * steps * STEP

    count = (num_queries + STEP - 1) // STEP
    load(k0_d, k1_d, k0_s, k1_s, k_full, batch, head, first, True, D0, D1)
    load(v0_d, v1_d, v0_s, v1_s, v_full, batch, head, first, True, D0, D1)
    for i in gl.static_range(STAGES):
        load(
            q0_d, q1_d, q0_s.index(i), q1_s.index(i), q_full.index(i),
            batch, head, i * STEP, i < count, D0, D1,
        )  # fmt: skip
        load(
            do0_d, do1_d, g0_s.index(i), g1_s.index(i), g_full.index(i),
            batch, head, i * STEP, i < count, D0, D1,
        )  # fmt: skip
    none = gl.zeros([BLOCK, STEP], gl.float32, S_LAYOUT)
    w, c = 0.0, 0.0
    if RATIO:
        w = of_tokens(p_w, STEP, WARPS)
        c = of_tokens(p_c, STEP, WARPS)
    mbarrier.wait(k_full, 0)
    activate(k0_s, k1_s, D, D0, D1, WARPS, FEATURE)
    mbarrier.wait(v_full, 0)
    mbarrier.wait(g_full.index(0), 0)
    p = scores(v0_s, v1_s, g0_s.index(0), g1_s.index(0), none, D1)
    mbarrier.wait(q_full.index(0), 0)
    activate(q0_s.index(0), q1_s.index(0), D, D0, D1, WARPS, FEATURE)
    a = scores(k0_s, k1_s, q0_s.index(0), q1_s.index(0), none, D1)
    a, p = warpgroup_mma_wait(0, deps=[a, p])

    slot, phase = 0, 0
    for t in range(1, count):
        a = weigh(a, w, 0.0, RATIO, False)
        dv0, dv1 = add_values(a, g0_s.index(slot), g1_s.index(slot), dv0, dv1, L0, L1, DTYPE)
        p = weigh(p, w, c, RATIO, RATIO)
        dk0, dk1 = add_values(p, q0_s.index(slot), q1_s.index(slot), dk0, dk1, L0, L1, DTYPE)
        old = slot
        slot, phase = advance(slot, phase, STAGES)
        if RATIO:
            w = of_tokens(p_w + t * STEP, STEP, WARPS)
            c = of_tokens(p_c + t * STEP, STEP, WARPS)
        mbarrier.wait(g_full.index(slot), phase)
        p = scores(v0_s, v1_s, g0_s.index(slot), g1_s.index(slot), none, D1)
        mbarrier.wait(q_full.index(slot), phase)
        activate(q0_s.index(slot), q1_s.index(slot), D, D0, D1, WARPS, FEATURE)
        a = scores(k0_s, k1_s, q0_s.index(slot), q1_s.index(slot), none, D1)
        dv0, dv1 = wait_for(dv0, dv1, D1 > 0)
        dk0, dk1 = wait_for(dk0, dk1, D1 > 0)
        a, p = warpgroup_mma_wait(0, deps=[a, p])
        token = (t - 1 + STAGES) * STEP
        if token < num_queries:
            # All warps have read the tile before.
            thread_barrier()
            load(
                q0_d, q1_d, q0_s.index(old), q1_s.index(old), q_full.index(old),
                batch, head, token, True, D0, D1,
            )  # fmt: skip
            load(
                do0_d, do1_d, g0_s.index(old), g1_s.index(old), g_full.index(old),
                batch, head, token, True, D0, D1,
            )  # fmt: skip

    # Nobody reads the own tiles any more: the gradients take their places.
    thread_barrier()
    if FEATURE != "identity":
        load(k0_d, k1_d, k0_s, k1_s, k_full, batch, head, first, True, D0, D1)
    a = weigh(a, w, 0.0, RATIO, False)
    dv0, dv1 = add_values(a, g0_s.index(slot), g1_s.index(slot), dv0, dv1, L0, L1, DTYPE)
    p = weigh(p, w, c, RATIO, RATIO)
    dk0, dk1 = add_values(p, q0_s.index(slot), q1_s.index(slot), dk0, dk1, L0, L1, DTYPE)
    dv0, dv1 = wait_for(dv0, dv1, D1 > 0)
    dk0, dk1 = wait_for(dk0, dk1, D1 > 0)
    if not RATIO:
        dk0, dv0 = dk0 * scale, dv0 * scale
        if D1 > 0:
            dk1, dv1 = dk1 * scale, dv1 * scale
    store(dv0_d, [batch, head, first, 0], v0_s, dv0)
    if D1 > 0:
        store(dv1_d, [batch, head, first, D0], v1_s, dv1)
    if FEATURE != "identity":
        mbarrier.wait(k_full, 1)
        dk0 = feature_grad(k0_s.load(L0), dk0, FEATURE)
        if D1 > 0:
            dk1 = feature_grad(k1_s.load(L1), dk1, FEATURE)
    store(dk0_d, [batch, head, first, 0], k0_s, dk0)
    if D1 > 0:
        store(dk1_d, [batch, head, first, D0], k1_s, dk1)
    tma.store_wait(0)
