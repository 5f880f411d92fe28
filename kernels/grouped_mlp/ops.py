"""The grouped MLP as a PyTorch operator, without a gradient; triton comes when it runs."""

from torch import Tensor

from .._common.operators import register
from .._common.plans import Memo


def _fwd_shapes(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, groups: int
) -> Tensor:
    return x.new_empty((x.shape[0], weight2.shape[0]))


_FWD = register(
    "grouped_mlp_fwd",
    "(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, int groups) -> Tensor",
    f"{__package__}.triton_fwd:grouped_mlp_fwd",
    _fwd_shapes,
)


def grouped_mlp_triton(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    groups: int, memo: Memo | None = None,
) -> Tensor:  # fmt: skip
    """The operation of `api.grouped_mlp` by the Triton kernel."""
    return _FWD(x, weight1, bias1, weight2, bias2, groups, memo=memo)
