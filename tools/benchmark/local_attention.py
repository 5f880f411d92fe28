"""Cases of local attention: CLEAR at FLUX size, against FlexAttention with the same mask."""

from collections.abc import Sequence
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lintra import kernels

from .case import Case, Peer, Run, check_shape, eager
from .linear_attention import softmax_attention

LAYOUT = "side,radius[,H,D,prefix[,pooled]]"
HEADS, DIM, PREFIX = 24, 128, 512
RADII = (8, 16, 32)
# Side of the grid: speed-up over FlexAttention forward at RADII, backward at radius 16.
SPEEDUPS: dict[int, tuple[tuple[float, float, float], float | None]] = {
    64: ((2.0, 2.0, 1.7), 1.5),
    128: ((3.2, 3.2, 2.6), 2.5),
    256: ((5.5, 5.5, 4.5), 4.0),
    512: ((6.0, 6.0, 5.5), None),
}
TINY = [(6, 2, 2, 16, 5, 0), (8, 3, 2, 16, 4, 1)]
# Dense attention above this many tokens takes seconds a call.
_DENSE_TOKENS = 70_000
# The float64 oracle sees this many heads where there are many pairs.
_CHECKED_PAIRS = 2**26


def visible_pairs(side: int, radius: float, prefix: int, extra: int) -> int:
    """Pairs of a query and a key that it sees, of one head."""
    reach = range(-side + 1, side)
    disc = sum(
        (side - abs(dy)) * (side - abs(dx))
        for dy in reach
        for dx in reach
        if dy * dy + dx * dx < radius * radius
    )
    image = side * side
    return prefix * (prefix + image) + image * (prefix + extra) + disc


def _inputs(
    tokens: int, heads: int, dim: int, extra: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    # FlexAttention's offsets are 32 bits: views of one projection of 512 x 512 tokens are beyond.
    axis = 2 if 3 * tokens * heads * dim < 2**31 else 0
    sizes = [1, tokens, heads, dim]
    sizes.insert(axis, 3)
    inputs = list(torch.randn(sizes, device=device, dtype=dtype).unbind(axis))
    if extra:
        inputs += torch.randn(1, extra, 2, heads, dim, device=device, dtype=dtype).unbind(2)
    return [x.requires_grad_() for x in inputs]


def _attend(
    impl: str, side: int, radius: float, prefix: int, query: Tensor, key: Tensor, *rest: Tensor
) -> Tensor:
    value, *extra = rest
    out = kernels.local_attention(
        query,
        key,
        value,
        grid=(side, side),
        radius=radius,
        num_prefix=prefix,
        extra_key=extra[0] if extra else None,
        extra_value=extra[1] if extra else None,
        impl=impl,
    )
    return cast(Tensor, out)


def flex_peer(side: int, radius: float, prefix: int) -> Peer:
    """FlexAttention under torch.compile with CLEAR's mask, as its authors run it."""

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q, k = query - prefix, key - prefix
        dy, dx = q // side - k // side, q % side - k % side
        return (q < 0) | (k < 0) | (dy * dy + dx * dx < radius * radius)

    @cache
    def mask_on(device: torch.device) -> BlockMask:
        tokens = prefix + side * side
        # Uncompiled it would hold all pairs of tokens.
        return create_block_mask(visible, None, None, tokens, tokens, device, _compile=True)

    def prepare() -> Run:
        flex = torch.compile(flex_attention, dynamic=False)

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Made by the first call, which is off the clock.
            mask = mask_on(query.device)
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return flex(q, k, v, block_mask=mask).transpose(1, 2)

        return run

    return Peer(prepare, is_compiled=True)


def build(
    shape: Sequence[int],
    group: str = "custom",
    forward: float | None = None,
    backward: float | None = None,
) -> Case:
    """The case of (side, radius, H, D, prefix, pooled); 24, 128, 512, 0 if left out.

    `forward` and `backward` are speed-ups over FlexAttention. `pooled` adds a key for each 16 image
    tokens, as CLEAR's down-sampled variant does.
    """
    check_shape(shape, (2, 5, 6), LAYOUT)
    shape = (*shape, *(HEADS, DIM, PREFIX, 0)[len(shape) - 2 :])
    side, radius, heads, dim, prefix, pooled = shape
    tokens, extra = prefix + side * side, side * side // 16 if pooled else 0
    pairs = visible_pairs(side, radius, prefix, extra)
    targets = {}
    if forward is not None:
        targets["fwd", "flex"] = forward
    if backward is not None:
        targets["bwd", "flex"] = backward
    if side == 64:
        targets["fwd", "sdpa"] = 1.0
    peers = {}
    if not pooled:
        peers["flex"] = flex_peer(side, radius, prefix)
        if tokens <= _DENSE_TOKENS:
            peers["sdpa"] = eager(softmax_attention)
    checked = max(1, min(heads, _CHECKED_PAIRS // pairs))

    def cut(inputs: list[Tensor]) -> list[Tensor]:
        return [x.detach()[:, :, :checked].requires_grad_() for x in inputs]

    return Case(
        op="local_attention",
        group=group + (" pooled" if pooled else ""),
        shape=f"{side}x{side} r{radius} {heads}x{dim} T{prefix}" + (" pooled" if pooled else ""),
        make=partial(_inputs, tokens, heads, dim, extra),
        ours=eager(partial(_attend, "auto", side, radius, prefix)),
        reference=partial(_attend, "reference", side, radius, prefix),
        floor_bytes=lambda size: (4 * tokens + 2 * extra) * heads * dim * size,
        flops=4.0 * pairs * heads * dim,
        is_attention=True,
        peers=peers,
        targets=targets,
        cut=cut,
        # At 8192 px the backward has no target and takes minutes in FlexAttention.
        directions=("fwd", "bwd", "fwd+bwd") if side < 512 else ("fwd",),
    )


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [build(shape) for shape in TINY]
    rows = [
        build((side, radius), f"grid {side}", forward, backward if radius == 16 else None)
        for side, (forwards, backward) in SPEEDUPS.items()
        for radius, forward in zip(RADII, forwards, strict=True)
    ]
    pooled = [build((side, 16, HEADS, DIM, PREFIX, 1), f"grid {side}") for side in (128, 256)]
    return [*rows, *pooled]
