"""Cases of adaptive norms and gated sums: LiT and FLUX, against the steps that diffusers takes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lintra import kernels

from .case import Case, check_shape, compiled, eager

LAYOUT = "B,N,C[,gated]"
# What the last number of a shape says, as labels have it.
KINDS = ("", " gated", " sum")  # a norm, a gated sum and a norm, a gated sum alone
_SUM = 2
# (B, N, C), each without and with a gated sum before.
SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "LiT-XL": [(32, 256, 1152), (1, 16384, 1152)],
    "LiT-B": [(32, 256, 768)],
    "FLUX": [(1, 4608, 3072)],
}
# (B, N, C) of sums alone, large enough for their kernel: blocks at 2048 pixels.
SUMS = {"LiT-XL": (1, 16384, 1152), "FLUX": (1, 16896, 3072)}
TINY = [(2, 5, 24, 0), (1, 7, 16, 1), (2, 3, 16, _SUM)]
_TARGETS = {
    ("fwd", "floor"): 1.5,
    ("fwd", "eager"): 2.0,
    ("bwd", "floor"): 1.5,
    ("bwd", "eager"): 2.0,
}

Results = Tensor | tuple[Tensor, Tensor]


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    batch, tokens, channels, kind = shape
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    # As a block has them: chunks of the output of one linear map.
    parameters = torch.randn(batch, 6 * channels, **options).chunk(6, dim=-1)
    inputs = [torch.randn(batch, tokens, channels, **options) for _ in range(2 if kind else 1)]
    # Views of a whole, and yet leaves.
    inputs += [x.detach() for x in parameters[: (2, 3, 1)[kind]]]
    return [x.requires_grad_() for x in inputs]


def _normalize(impl: str, x: Tensor, *others: Tensor) -> Results:
    if len(others) == 4:
        return kernels.gated_ada_layer_norm(x, *others, impl=impl)
    return kernels.ada_layer_norm(x, *others, impl=impl)


def _add(impl: str, *inputs: Tensor) -> Tensor:
    return kernels.gated_add(*inputs, impl=impl)


def stock_sum(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """The sum in one call of PyTorch; diffusers takes two."""
    return torch.addcmul(x, gate.unsqueeze(1), update)


def stock_normalization(x: Tensor, *others: Tensor) -> Results:
    """What the blocks of diffusers do, step by step."""
    *gated, scale, shift = others
    if gated:
        update, gate = gated
        x = gate.unsqueeze(1) * update + x
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    return (x, y) if gated else y


def _as_one(function: Callable[..., Results], *inputs: Tensor) -> Tensor:
    results = function(*inputs)
    return results if isinstance(results, Tensor) else torch.cat(results)


def build(shape: Sequence[int], group: str = "custom", with_targets: bool = False) -> Case:
    """The case of (B, N, C, index in KINDS), the last 0 if left out."""
    check_shape(shape, (3, 4), LAYOUT)
    batch, tokens, channels, kind = shape = (*shape, *(0,) * (4 - len(shape)))
    if kind >= len(KINDS):
        raise ValueError(f"`shape` must be {LAYOUT}, gated 0, 1 or 2, got {shape}")
    common: dict[str, Any] = {
        "op": "ada_layer_norm",
        "group": group,
        "shape": f"{batch}x{tokens}x{channels}{KINDS[kind]}",
        "make": partial(_inputs, shape),
    }
    run, stock = (_add, stock_sum) if kind == _SUM else (_normalize, stock_normalization)
    ours, reference = (partial(run, impl) for impl in ("auto", "reference"))
    checked = Case(
        ours=eager(partial(_as_one, ours)), reference=partial(_as_one, reference), **common
    )
    elements, parameters = batch * tokens * channels, batch * channels
    return Case(
        ours=eager(ours),  # type: ignore[arg-type]
        checks=(checked,),
        # x in and y out; with a gate also update in and h out, h alone for the sum.
        floor_bytes=lambda size: ((2, 4, 3)[kind] * elements + (2, 3, 1)[kind] * parameters) * size,
        peers={"eager": eager(stock), "compiled": compiled(stock)},  # type: ignore[arg-type]
        targets=_TARGETS if with_targets else {},
        **common,
    )


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [build(shape) for shape in TINY]
    norms = [
        build((*shape, gated), group, True)
        for group, shapes in SHAPES.items()
        for shape in shapes
        for gated in (0, 1)
    ]
    return [*norms, *(build((*shape, _SUM), group, True) for group, shape in SUMS.items())]
