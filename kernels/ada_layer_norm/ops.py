"""Adaptive layer normalisation and gated sums as PyTorch operators, without a gradient.

Triton comes when they run.
"""

from torch import Tensor

from .._common.operators import register
from .._common.plans import Memo


def _fwd_shapes(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _gated_fwd_shapes(
    x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_shapes(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_FWD = register(
    "ada_layer_norm_fwd",
    "(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
    f"{__package__}.triton_fwd:ada_layer_norm_fwd",
    _fwd_shapes,
)
_GATED_FWD = register(
    "gated_ada_layer_norm_fwd",
    "(Tensor x, Tensor update, Tensor gate, Tensor scale, Tensor shift, float eps)"
    " -> (Tensor, Tensor)",
    f"{__package__}.triton_fwd:gated_ada_layer_norm_fwd",
    _gated_fwd_shapes,
)
_ADD_FWD = register(
    "gated_add_fwd",
    "(Tensor x, Tensor update, Tensor gate) -> Tensor",
    f"{__package__}.triton_fwd:gated_add_fwd",
    _add_shapes,
)


def ada_layer_norm_triton(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, memo: Memo | None = None
) -> Tensor:
    """The operation of `api.ada_layer_norm` by the Triton kernel."""
    return _FWD(x, scale, shift, float(eps), memo=memo)


def gated_ada_layer_norm_triton(
    x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor,
    eps: float, memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of `api.gated_ada_layer_norm` by the Triton kernel."""
    return _GATED_FWD(x, update, gate, scale, shift, float(eps), memo=memo)


def gated_add_triton(x: Tensor, update: Tensor, gate: Tensor, memo: Memo | None = None) -> Tensor:
    """The operation of `api.gated_add` by the Triton kernel."""
    return _ADD_FWD(x, update, gate, memo=memo)
