"""Linear attention with a local term as one node of the graph of gradients.

Values have two gradients, of attention and of convolution: the convolution's kernel adds them,
where autograd would read and write all tokens once more.
"""

from typing import Any

import torch
from torch import Tensor

from ..linear_attention.ops import attend, attend_bwd
from ..token_conv.ops import convolve, convolve_bwd_tokens, convolve_bwd_weight


class _LinearAttentionConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None,
        feature_map: str, normalizer: str, scale: float, eps: float,
        prefix: int, height: int, width: int,
    ) -> Tensor:  # fmt: skip
        ctx.attention = (feature_map, normalizer, scale, eps)
        ctx.grid = (prefix, height, width)
        ctx.bias_dtype = None if bias is None else bias.dtype
        attended, *kept = attend(query, key, value, *ctx.attention)
        assert attended is not None
        ctx.save_for_backward(query, key, value, weight, *kept)
        return convolve(value.flatten(2), weight, bias, attended.flatten(2), *ctx.grid)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weight, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_query = d_key = d_value = None
        if any(needs[:3]):
            d_attended = d_out.unflatten(2, value.shape[2:])
            d_query, d_key, d_value = attend_bwd(
                d_attended, query, key, value, *ctx.attention, *kept
            )
        if needs[2]:
            assert d_value is not None
            d_value = convolve_bwd_tokens(d_out, weight, d_value.flatten(2), *ctx.grid)
            d_value = d_value.unflatten(2, value.shape[2:])
        d_weight, d_bias = convolve_bwd_weight(
            d_out, value.flatten(2), weight, ctx.bias_dtype, *needs[3:5], *ctx.grid
        )
        return d_query, d_key, d_value, d_weight, d_bias, *[None] * 7


def linear_attention_conv2d_triton(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None,
    attention: tuple[str, str, float, float], grid: tuple[int, int, int],
) -> Tensor:  # fmt: skip
    """The operation of `api.linear_attention_conv2d` with a gradient, on tensors that both parts
    have checked: `attention` is the feature map, the normalizer, scale and eps, `grid` the number
    of prefix tokens, height and width."""
    return _LinearAttentionConv2d.apply(query, key, value, weight, bias, *attention, *grid)
