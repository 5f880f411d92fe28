"""The quadratic order of linear attention for Hopper; the mathematics is that of
`triton_quadratic.py`.

A program owns a tile of queries. The copy engine (TMA) brings them and, into a ring of shared
memory, tiles of keys and values; what lies outside a tensor arrives as zeros. All warps apply the
feature map in place, each element once, and the tensor cores read queries, keys and values from
shared memory, the scores from registers. While they add the values of one tile the warps prepare
the keys of the next.

Written in Gluon: Triton's own language loads the queries anew for every tile of keys, which makes
the compiler wait after each matrix instruction.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div
from . import configs
from .hopper_blocks import (
    activate,
    add_values,
    advance,
    allocate,
    boxes_of,
    load,
    scores,
    store,
    thread_barrier,
    wait_for,
)


@gluon.jit(do_not_specialize=["num_keys", "tiles", "heads", "scale", "eps"])
def _linear_attention_fwd_quadratic_hopper_kernel(
    q0_d, q1_d, k0_d, k1_d, v0_d, v1_d, o0_d, o1_d, num_keys, tiles, heads, scale, eps,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    FEATURE: gl.constexpr, RATIO: gl.constexpr,
    BLOCK: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid (B * H * tiles of BLOCK queries), sixteen of which a warp owns; STAGES > 1 places in the
    rings of STEP keys and values. Values and output have the D channels of the keys."""
    DTYPE: gl.constexpr = q0_d.dtype
    WARPS: gl.constexpr = BLOCK // 16
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, STEP, 16])
    Y0_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D0, 16])
    Y1_LAYOUT: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D1, 16]) if D1 > 0 else None
    )
    q0_s, q1_s, q_full = allocate(DTYPE, 1, BLOCK, D0, D1)
    k0_s, k1_s, k_full = allocate(DTYPE, STAGES, STEP, D0, D1)
    v0_s, v1_s, v_full = allocate(DTYPE, STAGES, STEP, D0, D1)
    thread_barrier()
    q0_s, q1_s, q_full = q0_s.index(0), q1_s.index(0), q_full.index(0)
    y0, y1 = gl.zeros([BLOCK, D0], gl.float32, Y0_LAYOUT), 0.0
    if D1 > 0:
        y1 = gl.zeros([BLOCK, D1], gl.float32, Y1_LAYOUT)

    row = gl.program_id(0) // tiles
    first = gl.program_id(0) % tiles * BLOCK
    batch, head = row // heads, row % heads
    count = (num_keys + STEP - 1) // STEP
    load(q0_d, q1_d, q0_s, q1_s, q_full, batch, head, first, 0, True, D0, D1)
    for i in gl.static_range(STAGES):
        load(
            k0_d, k1_d, k0_s.index(i), k1_s.index(i), k_full.index(i),
            batch, head, i * STEP, 0, i < count, D0, D1,
        )  # fmt: skip
        load(
            v0_d, v1_d, v0_s.index(i), v1_s.index(i), v_full.index(i),
            batch, head, i * STEP, 0, i < count, D0, D1,
        )  # fmt: skip

    none = gl.zeros([BLOCK, STEP], gl.float32, S_LAYOUT)
    total = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    o_n = gl.arange(0, STEP, gl.SliceLayout(0, S_LAYOUT))
    mbarrier.wait(q_full, 0)
    activate(q0_s, q1_s, D, D0, D1, WARPS, FEATURE)
    mbarrier.wait(k_full.index(0), 0)
    activate(k0_s.index(0), k1_s.index(0), D, D0, D1, WARPS, FEATURE)
    s = scores(q0_s, q1_s, k0_s.index(0), k1_s.index(0), none, D1)
    s = warpgroup_mma_wait(0, deps=[s])
    if count > STAGES:
        thread_barrier()
        load(
            k0_d, k1_d, k0_s.index(0), k1_s.index(0), k_full.index(0),
            batch, head, STAGES * STEP, 0, True, D0, D1,
        )  # fmt: skip

    slot, phase = 0, 0
    for t in range(1, count):
        # All of these keys exist, a tile follows them.
        if RATIO:
            total += gl.sum(s, 1)
        mbarrier.wait(v_full.index(slot), phase)
        y0, y1 = add_values(
            s, v0_s.index(slot), v1_s.index(slot), y0, y1, Y0_LAYOUT, Y1_LAYOUT, DTYPE
        )
        old = slot
        slot, phase = advance(slot, phase, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        activate(k0_s.index(slot), k1_s.index(slot), D, D0, D1, WARPS, FEATURE)
        s = scores(q0_s, q1_s, k0_s.index(slot), k1_s.index(slot), none, D1)
        y0, y1 = wait_for(y0, y1, D1 > 0)
        s = warpgroup_mma_wait(0, deps=[s])
        token = (t - 1 + STAGES) * STEP
        if token < num_keys:
            # All warps have read the values of the tile before, and these keys.
            thread_barrier()
            load(
                v0_d, v1_d, v0_s.index(old), v1_s.index(old), v_full.index(old),
                batch, head, token, 0, True, D0, D1,
            )  # fmt: skip
            load(
                k0_d, k1_d, k0_s.index(slot), k1_s.index(slot), k_full.index(slot),
                batch, head, token + STEP, 0, token + STEP < num_keys, D0, D1,
            )  # fmt: skip

    gains = gl.full([BLOCK], 1.0, gl.float32, gl.SliceLayout(1, S_LAYOUT)) * scale
    if RATIO:
        if FEATURE == "elu1":
            # phi(0) is not 0: keys beyond the last count here, while their values are zero.
            s = gl.where(((count - 1) * STEP + o_n < num_keys)[None, :], s, 0.0)
        total += gl.sum(s, 1)
        gains = scale / (scale * total + eps)
    mbarrier.wait(v_full.index(slot), phase)
    y0, y1 = add_values(s, v0_s.index(slot), v1_s.index(slot), y0, y1, Y0_LAYOUT, Y1_LAYOUT, DTYPE)
    y0, y1 = wait_for(y0, y1, D1 > 0)
    # The output takes the place of the queries, which nobody reads any more.
    thread_barrier()
    y0 = y0 * gl.convert_layout(gains, gl.SliceLayout(1, Y0_LAYOUT))[:, None]
    store(o0_d, [batch, head, first, 0], q0_s, y0)
    if D1 > 0:
        y1 = y1 * gl.convert_layout(gains, gl.SliceLayout(1, Y1_LAYOUT))[:, None]
        store(o1_d, [batch, head, first, D0], q1_s, y1)
    tma.store_wait(0)


def plan_quadratic_hopper(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> KernelCall:  # fmt: skip
    """The launch on queries, keys, values and output that the copy engine takes; no covariance,
    bfloat16 and as many value as head channels only."""
    query, key, _, _ = tensors
    batch, num_queries, heads, head_dim = query.shape
    launch = configs.launch_of("fwd_quadratic_hopper", query, head_dim)
    parts = configs.parts_of(head_dim, "d", "fwd_quadratic_hopper", query.dtype)
    tiles = ceil_div(num_queries, launch.block)
    rows = (launch.block, launch.step, launch.step, launch.block)
    boxes = [
        (index, box)
        for index, (tensor, count) in enumerate(zip(tensors, rows, strict=True))
        for box in boxes_of(tensor, count, *parts)
    ]
    constants = {
        "D": head_dim, "D0": parts[0], "D1": parts[1],
        "FEATURE": feature_map, "RATIO": normalizer == "ratio",
        "BLOCK": launch.block, "STEP": launch.step, "STAGES": launch.stages,
        "num_warps": launch.block // 16,
    }  # fmt: skip
    return KernelCall(
        _linear_attention_fwd_quadratic_hopper_kernel, (batch * heads * tiles,),
        (key.shape[1], tiles, heads, scale, eps), constants, boxes, only_boxes=4,
    )  # fmt: skip
