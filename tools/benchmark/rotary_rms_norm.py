"""Cases of norm and rotary positions of FLUX's queries and keys, against diffusers' steps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional as F

from lintra import kernels

from .case import Case, check_shape, compiled, eager

LAYOUT = "B,N,H,D"
# FLUX.1-dev at 1024, 2048 and 4096 px, with 512 text tokens.
SHAPES = [(1, 4608, 24, 128), (1, 16896, 24, 128), (1, 66048, 24, 128)]
TINY = [(2, 5, 3, 16), (1, 7, 2, 64)]
_TARGETS = {
    ("fwd", "floor"): 1.5,
    ("fwd", "eager"): 2.0,
    ("bwd", "floor"): 1.5,
    ("bwd", "eager"): 2.0,
}
_EPS = 1e-6

Results = tuple[Tensor, Tensor]


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    batch, tokens, heads, dim = shape
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    query, key = (torch.randn(batch, tokens, heads, dim, **options) for _ in range(2))
    angles = 10 * torch.rand(tokens, dim // 2, device=device)
    tables = [f(angles).repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin)]
    learned = [query, key, *torch.randn(2, dim, **options).unbind()]
    return [*(x.requires_grad_() for x in learned), *tables]


def _turn(impl: str, *inputs: Tensor) -> Results:
    return kernels.rotary_rms_norm(*inputs, eps=_EPS, impl=impl)


def stock_steps(*inputs: Tensor) -> Results:
    """What FLUX's attention does in diffusers."""
    query, key, query_weight, key_weight, *tables = inputs
    query, key = (
        apply_rotary_emb(F.rms_norm(x, weight.shape, weight, _EPS), tables, sequence_dim=1)
        for x, weight in ((query, query_weight), (key, key_weight))
    )
    return query, key


def _as_one(impl: str, *inputs: Tensor) -> Tensor:
    return torch.cat(_turn(impl, *inputs))


def build(shape: Sequence[int], group: str = "custom", with_targets: bool = False) -> Case:
    """The case of (B, N, H, D)."""
    check_shape(shape, (4,), LAYOUT)
    batch, tokens, heads, dim = shape
    common: dict[str, Any] = {
        "op": "rotary_rms_norm",
        "group": group,
        "shape": "x".join(map(str, shape)),
        "make": partial(_inputs, shape),
    }
    checked = Case(
        ours=eager(partial(_as_one, "auto")), reference=partial(_as_one, "reference"), **common
    )
    return Case(
        ours=eager(partial(_turn, "auto")),  # type: ignore[arg-type]
        checks=(checked,),
        # Two tensors in and out, and two tables in float32.
        floor_bytes=lambda size: 4 * batch * tokens * heads * dim * size + 8 * tokens * dim,
        peers={"eager": eager(stock_steps), "compiled": compiled(stock_steps)},  # type: ignore[arg-type]
        targets=_TARGETS if with_targets else {},
        **common,
    )


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [build(shape) for shape in TINY]
    return [build(shape, "FLUX", True) for shape in SHAPES]
