"""Layer normalisation as a PyTorch operator, without a gradient; triton comes when it runs."""

from torch import Tensor

from .._common.operators import register
from .._common.plans import Memo


def _fwd_shapes(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


_FWD = register(
    "layer_norm_fwd",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    f"{__package__}.triton_fwd:layer_norm_fwd",
    _fwd_shapes,
)


def layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, memo: Memo | None = None
) -> Tensor:
    """The operation of `api.layer_norm` by the Triton kernel."""
    return _FWD(x, weight, bias, float(eps), memo=memo)
