"""Linear attention with a local term as a PyTorch operator, without a gradient."""

from collections.abc import Sequence

from torch import Tensor

from .._common.operators import register


def _fwd_shapes(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rest: Sequence[Tensor],
    feature_map: str, normalizer: str, eps: float, height: int, width: int, prefix: int,
    groups: int | None, size: int | None,
) -> Tensor:  # fmt: skip
    return query.new_empty(*query.shape[:2], value.shape[2] * value.shape[3])


linear_attention_conv2d_op = register(
    "linear_attention_conv2d_fwd",
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor[] rest, str feature_map,"
    " str normalizer, float eps, SymInt height, SymInt width, int prefix, int? groups, int? size)"
    " -> Tensor",
    f"{__package__}.launches:linear_attention_conv2d_fwd",
    _fwd_shapes,
)
