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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .._common.launch import ceil_div
from . import configs

# Triton 3.6 calls it thread_barrier.
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _feature(
    tile, first, D: gl.constexpr, WIDTH: gl.constexpr, WARPS: gl.constexpr, FEATURE: gl.constexpr
):
    """phi of a tile of shared memory; zero in the padding of the channels."""
    LANES: gl.constexpr = min(8, WIDTH // 8)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    x = tile.load(LAYOUT)
    if FEATURE == "relu":
        x = gl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.bf16x2 $0, $1, zero; }",
            "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        gl.static_assert(FEATURE == "elu1")
        wide = x.to(gl.float32)
        inside = (first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT)) < D)[None, :]
        x = gl.where(wide > 0, wide + 1, gl.exp(wide))
        x = gl.where(inside, x, 0.0).to(tile.dtype)
    return x


@gluon.jit
def _activate(
    t0, t1, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    WARPS: gl.constexpr, FEATURE: gl.constexpr,
):  # fmt: skip
    """phi of both parts of a tile, in place, for the tensor cores to read."""
    if FEATURE != "identity":
        x0 = _feature(t0, 0, D, D0, WARPS, FEATURE)
        if D1 > 0:
            t1.store(_feature(t1, D0, D, D1, WARPS, FEATURE))
        t0.store(x0)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _copy(desc, place, barrier, tile, pred):
    shape: gl.constexpr = desc.block_type.shape
    tile = tile._reinterpret(desc.dtype, shape, desc.layout)
    tma.async_copy_global_to_shared(desc, place, barrier, tile, pred)


@gluon.jit
def _load(d0, d1, t0, t1, barrier, batch, head, token, pred, W0: gl.constexpr, W1: gl.constexpr):
    """Starts the copies of both parts of a tile."""
    if W1 > 0:
        mbarrier.expect(barrier, d0.block_type.nbytes + d1.block_type.nbytes, pred)
        _copy(d1, [batch, head, token, W0], barrier, t1, pred)
    else:
        mbarrier.expect(barrier, d0.block_type.nbytes, pred)
    _copy(d0, [batch, head, token, 0], barrier, t0, pred)


@gluon.jit
def _scores(q0, q1, k0, k1, none, D1: gl.constexpr):
    """Asks for phi(q) phi(k)^T."""
    s = warpgroup_mma(q0, k0.permute((1, 0)), none, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _add_values(s, v0, v1, y0, y1, L0: gl.constexpr, L1: gl.constexpr, DTYPE: gl.constexpr):
    """Asks for y + s v; L1 is None if there is one part only."""
    s = s.to(DTYPE)
    weights = gl.convert_layout(s, gl.DotOperandLayout(0, L0, 2))
    y0 = warpgroup_mma(weights, v0, y0, is_async=True)
    if L1 is not None:
        weights = gl.convert_layout(s, gl.DotOperandLayout(0, L1, 2))
        y1 = warpgroup_mma(weights, v1, y1, is_async=True)
    return y0, y1


@gluon.jit
def _await(y0, y1, BOTH: gl.constexpr):
    if BOTH:
        y0, y1 = warpgroup_mma_wait(0, deps=[y0, y1])
    else:
        y0 = warpgroup_mma_wait(0, deps=[y0])
    return y0, y1


@gluon.jit
def _store(desc, place, tile, y, gains, LAYOUT: gl.constexpr):
    y = y * gl.convert_layout(gains, gl.SliceLayout(1, LAYOUT))[:, None]
    tile.store(y.to(desc.dtype))
    fence_async_shared()
    thread_barrier()
    shape: gl.constexpr = desc.block_type.shape
    tma.async_copy_shared_to_global(desc, place, tile._reinterpret(desc.dtype, shape, desc.layout))


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
    LAYOUT0: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * D0), 16, 2)
    q0_s = gl.allocate_shared_memory(DTYPE, [BLOCK, D0], LAYOUT0)
    k0_s = gl.allocate_shared_memory(DTYPE, [STAGES, STEP, D0], LAYOUT0)
    v0_s = gl.allocate_shared_memory(DTYPE, [STAGES, STEP, D0], LAYOUT0)
    y0 = gl.zeros([BLOCK, D0], gl.float32, Y0_LAYOUT)
    q1_s, k1_s, v1_s, y1 = q0_s, k0_s, v0_s, 0.0
    if D1 > 0:
        LAYOUT1: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * D1), 16, 2)
        q1_s = gl.allocate_shared_memory(DTYPE, [BLOCK, D1], LAYOUT1)
        k1_s = gl.allocate_shared_memory(DTYPE, [STAGES, STEP, D1], LAYOUT1)
        v1_s = gl.allocate_shared_memory(DTYPE, [STAGES, STEP, D1], LAYOUT1)
        y1 = gl.zeros([BLOCK, D1], gl.float32, Y1_LAYOUT)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    thread_barrier()

    row = gl.program_id(0) // tiles
    first = gl.program_id(0) % tiles * BLOCK
    batch, head = row // heads, row % heads
    count = (num_keys + STEP - 1) // STEP
    _load(q0_d, q1_d, q0_s, q1_s, q_full, batch, head, first, True, D0, D1)
    for i in gl.static_range(STAGES):
        _load(
            k0_d, k1_d, k0_s.index(i), k1_s.index(i), k_full.index(i),
            batch, head, i * STEP, i < count, D0, D1,
        )  # fmt: skip
        _load(
            v0_d, v1_d, v0_s.index(i), v1_s.index(i), v_full.index(i),
            batch, head, i * STEP, i < count, D0, D1,
        )  # fmt: skip

    none = gl.zeros([BLOCK, STEP], gl.float32, S_LAYOUT)
    total = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    o_n = gl.arange(0, STEP, gl.SliceLayout(0, S_LAYOUT))
    mbarrier.wait(q_full, 0)
    _activate(q0_s, q1_s, D, D0, D1, WARPS, FEATURE)
    mbarrier.wait(k_full.index(0), 0)
    _activate(k0_s.index(0), k1_s.index(0), D, D0, D1, WARPS, FEATURE)
    s = _scores(q0_s, q1_s, k0_s.index(0), k1_s.index(0), none, D1)
    s = warpgroup_mma_wait(0, deps=[s])
    if count > STAGES:
        thread_barrier()
        _load(
            k0_d, k1_d, k0_s.index(0), k1_s.index(0), k_full.index(0),
            batch, head, STAGES * STEP, True, D0, D1,
        )  # fmt: skip

    slot, phase = 0, 0
    for t in range(1, count):
        # All of these keys exist, a tile follows them.
        if RATIO:
            total += gl.sum(s, 1)
        mbarrier.wait(v_full.index(slot), phase)
        y0, y1 = _add_values(
            s, v0_s.index(slot), v1_s.index(slot), y0, y1, Y0_LAYOUT, Y1_LAYOUT, DTYPE
        )
        old = slot
        last = slot == STAGES - 1
        slot, phase = gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)
        mbarrier.wait(k_full.index(slot), phase)
        _activate(k0_s.index(slot), k1_s.index(slot), D, D0, D1, WARPS, FEATURE)
        s = _scores(q0_s, q1_s, k0_s.index(slot), k1_s.index(slot), none, D1)
        y0, y1 = _await(y0, y1, D1 > 0)
        s = warpgroup_mma_wait(0, deps=[s])
        token = (t - 1 + STAGES) * STEP
        if token < num_keys:
            # All warps have read the values of the tile before, and these keys.
            thread_barrier()
            _load(
                v0_d, v1_d, v0_s.index(old), v1_s.index(old), v_full.index(old),
                batch, head, token, True, D0, D1,
            )  # fmt: skip
            _load(
                k0_d, k1_d, k0_s.index(slot), k1_s.index(slot), k_full.index(slot),
                batch, head, token + STEP, token + STEP < num_keys, D0, D1,
            )  # fmt: skip

    gains = gl.full([BLOCK], 1.0, gl.float32, gl.SliceLayout(1, S_LAYOUT)) * scale
    if RATIO:
        if FEATURE == "elu1":
            # phi(0) is not 0: keys beyond the last count here, while their values are zero.
            s = gl.where(((count - 1) * STEP + o_n < num_keys)[None, :], s, 0.0)
        total += gl.sum(s, 1)
        gains = scale / (scale * total + eps)
    mbarrier.wait(v_full.index(slot), phase)
    y0, y1 = _add_values(s, v0_s.index(slot), v1_s.index(slot), y0, y1, Y0_LAYOUT, Y1_LAYOUT, DTYPE)
    y0, y1 = _await(y0, y1, D1 > 0)
    # The output takes the place of the queries, which nobody reads any more.
    thread_barrier()
    _store(o0_d, [batch, head, first, 0], q0_s, y0, gains, Y0_LAYOUT)
    if D1 > 0:
        _store(o1_d, [batch, head, first, D0], q1_s, y1, gains, Y1_LAYOUT)
    tma.store_wait(0)


def _descriptors(tensor: Tensor, rows: int, *widths: int) -> list[TensorDescriptor]:
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
        boxes.append(TensorDescriptor(tensor, shape, strides, [1, 1, rows, width], layout))
    return boxes


def attend_quadratic_hopper(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    feature_map: str, normalizer: str, scale: float, eps: float,
) -> None:  # fmt: skip
    """Fills `out`; no covariance, bfloat16 and as many value as head channels only."""
    batch, num_queries, heads, head_dim = query.shape
    launch = configs.launch_of("fwd_quadratic_hopper", query, head_dim)
    parts = configs.parts_of(head_dim, "d", "fwd_quadratic_hopper", query.dtype)
    tiles = ceil_div(num_queries, launch.block)
    rows = (launch.block, launch.step, launch.step, launch.block)
    boxes = [
        box
        for tensor, count in zip((query, key, value, out), rows, strict=True)
        for box in _descriptors(tensor, count, *parts)
    ]
    _linear_attention_fwd_quadratic_hopper_kernel[(batch * heads * tiles,)](
        *boxes, key.shape[1], tiles, heads, scale, eps, D=head_dim, D0=parts[0], D1=parts[1],
        FEATURE=feature_map, RATIO=normalizer == "ratio",
        BLOCK=launch.block, STEP=launch.step, STAGES=launch.stages, num_warps=launch.block // 16,
    )  # fmt: skip
