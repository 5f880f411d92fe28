"""Signature and choice of the way of linear attention with a local term."""

import torch
from torch import Tensor

from .._common.launch import KERNEL_DTYPES
from .._common.operators import is_dispatched, needs_gradient
from ..linear_attention.configs import MAX_HEAD_DIM
from ..token_conv.configs import MAX_SIZE
from . import launches
from .composition import FilterMlp, composed
from .ops import linear_attention_conv2d_op


def _is_one_operator(query: Tensor, value: Tensor, size: int) -> bool:
    """Whether a graph holds one operator: where kernels may run, whose checks it need not see."""
    return (
        query.is_cuda
        and query.dtype in KERNEL_DTYPES
        and max(query.shape[3], value.shape[3]) <= MAX_HEAD_DIM
        and size <= MAX_SIZE
    )


def linear_attention_conv2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | FilterMlp,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    feature_map: str = "relu",
    normalizer: str = "ratio",
    eps: float = 1e-6,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """``token_conv2d(value, weight, bias, residual=linear_attention(query, key, value))``.

    The mixer of SLA (Guo et al. 2024, arXiv:2405.11582) and, with filters that `grouped_mlp` makes,
    of InLine (Han et al. 2024, arXiv:2412.06590) between the projections. The kernels are those of
    the three operations; where no gradient is asked for, they are launched one after the other
    without views between and by one look-up: eager mode waits for the host. With a gradient they
    are one node, in which the convolution's kernel adds the two gradients of values.

    Args:
        query: ``(B, N, H, D)``, see `linear_attention`.
        key: ``(B, N, H, D)``.
        value: ``(B, N, H, E)``.
        weight: ``(F, k, k)`` or ``(B, F, k, k)``, see `token_conv2d`, or the MLP that makes such
            filters, then of F = H E.
        bias: ``(F)``.
        grid: ``(h, w)``, in tokens.
        feature_map: see `linear_attention`.
        normalizer: see `linear_attention`, whose usual scale is taken.
        eps: see `linear_attention`.
        num_prefix_tokens: N - h w tokens before those of the grid, which are not convolved.

    Returns:
        ``(B, N, H E)`` in ``query.dtype``.

    Raises:
        ValueError: as the three operations.
        TypeError: as the three operations.
    """
    mlp = None if isinstance(weight, Tensor) else weight
    tensors = (query, key, value, bias, *((weight,) if mlp is None else mlp[:5]))
    groups, size = (None, None) if mlp is None else mlp[5:]
    options = (feature_map, normalizer, eps, grid, num_prefix_tokens, groups, size)
    if torch.compiler.is_compiling():
        side = weight.shape[-1] if isinstance(weight, Tensor) else weight.size
        if _is_one_operator(query, value, side) and not needs_gradient(*tensors):
            return linear_attention_conv2d_op(
                *tensors[:4], list(tensors[4:]), feature_map, normalizer, eps, *grid,
                num_prefix_tokens, groups, size,
            )  # fmt: skip
    elif not is_dispatched(tensors):
        plan = launches.PLANS(tensors, *options)
        if plan is not None:
            return launches.launched(plan, tensors, feature_map, normalizer, eps, groups)
    return composed(tensors, *options)
