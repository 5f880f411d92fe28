"""Linear attention with a local term as the three operations that it is."""

from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from ..grouped_mlp import grouped_mlp
from ..linear_attention import linear_attention
from ..token_conv import token_conv2d

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
    out = linear_attention(
        query, key, value, feature_map=feature_map, normalizer=normalizer, eps=eps
    )
    weight = rest[0]
    if groups is not None and size is not None:
        x, weight1, bias1, weight2, bias2 = rest
        weight = FilterMlp(x, weight1, bias1, weight2, bias2, groups, size).filters()
    return token_conv2d(
        value.flatten(2), weight, bias,
        grid=grid, residual=out.flatten(2), num_prefix_tokens=prefix,
    )  # fmt: skip
