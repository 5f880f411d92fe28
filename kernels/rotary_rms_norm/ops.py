"""Normalisation and rotation as a PyTorch operator, without a gradient; triton comes when it
runs."""

from torch import Tensor

from .._common.operators import register
from .._common.plans import Memo


def _fwd_shapes(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor,
    cosines: Tensor, sines: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape)


_FWD = register(
    "rotary_rms_norm_fwd",
    "(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor cosines,"
    " Tensor sines, float eps) -> (Tensor, Tensor)",
    f"{__package__}.triton_fwd:rotary_rms_norm_fwd",
    _fwd_shapes,
)


def rotary_rms_norm_triton(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor,
    cosines: Tensor, sines: Tensor, eps: float, memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of `api.rotary_rms_norm` by the Triton kernel."""
    tensors = (query, key, query_weight, key_weight, cosines, sines)
    return _FWD(*tensors, float(eps), memo=memo)
