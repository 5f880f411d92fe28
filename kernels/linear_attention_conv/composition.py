"""Linear attention with a local term as the three operations that it is."""

from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .._common.operators import needs_gradient, reason_of_transforms
from ..grouped_mlp import grouped_mlp
from ..linear_attention import api as attention_api
from ..linear_attention import linear_attention
from ..token_conv import api as conv_api
from ..token_conv import token_conv2d
from .gradient import linear_attention_conv2d_triton

# Query, key, value, the bias or None, and the filters or what a `FilterMlp` makes them from.
Tensors: TypeAlias = tuple[Any, ...]


class FilterMlp(NamedTuple):
    """Arguments of `grouped_mlp` whose outputs ``(B, F k k)`` are a sample's filters, k is `size`.

    Raises:
        ValueError: outputs that are no filters of this size.
    """

    x: Tensor
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    groups: int
    size: int

    def filters(self) -> Tensor:
        """``(B, F, k, k)``."""
        x, weight1, bias1, weight2, bias2, groups, size = self
        outputs = grouped_mlp(x, weight1, bias1, weight2, bias2, groups=groups)
        batch, width = outputs.shape
        if width % size**2:
            raise ValueError(f"`weight2` must make filters of {size} x {size}, got {width} outputs")
        return outputs.view(batch, width // size**2, size, size)


def composed(
    tensors: Tensors,
    feature_map: str, normalizer: str, eps: float,
    grid: tuple[int, int], prefix: int, groups: int | None, size: int | None,
) -> Tensor:  # fmt: skip
    """The operation of `api.linear_attention_conv2d`, whoever computes its parts."""
    query, key, value, bias, *rest = tensors
    weight = rest[0]
    if groups is not None and size is not None:
        x, weight1, bias1, weight2, bias2 = rest
        weight = FilterMlp(x, weight1, bias1, weight2, bias2, groups, size).filters()
    # First what refuses bad arguments.
    attended, scale, _ = attention_api.CALLS(
        (query, key, value), feature_map, normalizer, None, eps, "auto"
    )
    values = value.flatten(2)
    convolved, sides, _ = conv_api.CALLS((values, weight, bias, values), grid, prefix, "auto")
    inputs = (query, key, value, weight, bias)
    if (
        attended
        and convolved
        and needs_gradient(*inputs)
        and query.shape[1:3] == value.shape[1:3]
        and reason_of_transforms() is None
    ):
        attention = (feature_map, normalizer, float(scale), float(eps))
        return linear_attention_conv2d_triton(*inputs, attention, (prefix, *sides))
    out = linear_attention(
        query, key, value, feature_map=feature_map, normalizer=normalizer, eps=eps
    )
    return token_conv2d(
        values, weight, bias, grid=grid, residual=out.flatten(2), num_prefix_tokens=prefix
    )
