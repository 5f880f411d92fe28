"""Cases of linear attention: issue shapes, against softmax attention and the eager form."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lintra import kernels

from .case import Case, check_shape, compiled, eager

LAYOUT = "B,N,H,D"
# Group: (multiple of the floor forward, backward, shapes (B, N, H, D)).
SHAPES: dict[str, tuple[float, float, list[tuple[int, ...]]]] = {
    "DeiT": (1.5, 2.0, [(256, 197, 3, 64), (256, 197, 6, 64), (256, 197, 6, 32)]),
    "windows": (1.4, 2.0, [(4096, 49, 3, 32)]),
    "PVT / Swin": (1.5, 2.0, [(64, 3136, 1, 64), (64, 3136, 3, 32), (64, 784, 6, 32)]),
    "DiT": (1.5, 2.0, [(64, 256, 16, 72), (16, 4096, 16, 72), (2, 16384, 16, 72)]),
    "long": (1.4, 2.0, [(1, 65536, 24, 128)]),
    "LiT": (
        2.0,
        2.5,
        [(64, 256, 2, 192), (64, 256, 4, 288), (16, 1024, 4, 288), (1, 16384, 4, 288)],
    ),
}
TINY = [(2, 17, 2, 16), (1, 40, 1, 24)]
FORMS: dict[str, dict[str, Any]] = {
    "sla": {"feature_map": "relu", "normalizer": "ratio"},
    "inline": {"feature_map": "identity", "normalizer": "covariance"},
}


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    batch, tokens, heads, dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, dim, device=device, dtype=dtype)
    # Views of one projection's output, as in every model.
    return [x.requires_grad_() for x in qkv.unbind(2)]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _attend(form: str, impl: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # Looked up at the call: a test replaces it.
    return kernels.linear_attention(query, key, value, impl=impl, **FORMS[form])


def build(
    shape: Sequence[int],
    group: str = "custom",
    forward: float | None = None,
    backward: float | None = None,
    form: str = "sla",
) -> Case:
    """The case of one shape (B, N, H, D); `forward` and `backward` are multiples of the floor."""
    check_shape(shape, (4,), LAYOUT)
    batch, tokens, heads, dim = shape
    targets = {}
    if forward is not None and backward is not None:
        targets = {("fwd", "floor"): forward, ("bwd", "floor"): backward}
        targets |= {("fwd", "sdpa"): 1.0, ("fwd+bwd", "sdpa"): 1.0}
    elements = batch * tokens * heads * dim
    return Case(
        op="linear_attention",
        group=group if form == "sla" else f"{group} {form}",
        shape="x".join(map(str, shape)),
        make=partial(_inputs, tuple(shape)),
        ours=eager(partial(_attend, form, "auto")),
        reference=partial(_attend, form, "reference"),
        floor_bytes=lambda size: 4 * elements * size,
        flops=4.0 * elements * dim,
        peers={
            "sdpa": eager(softmax_attention),
            "eager": eager(partial(_attend, form, "reference")),
            "compiled": compiled(partial(_attend, form, "reference")),
        },
        targets=targets,
    )


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [build(shape, form=form) for shape in TINY for form in FORMS]
    rows = [
        build(shape, group, forward, backward)
        for group, (forward, backward, shapes) in SHAPES.items()
        for shape in shapes
    ]
    # The other member of the family, where InLine's backbones use it.
    forward, backward, shapes = SHAPES["DeiT"]
    return [*rows, build(shapes[0], "DeiT", forward, backward, form="inline")]
