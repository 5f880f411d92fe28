"""Linear attention with a local term: three operations, which are checked and planned as one."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._common.launch import device_guard, empty
from .._common.operators import is_dispatched
from .._common.plans import Memo, Plans
from ..grouped_mlp import api as mlp_api
from ..grouped_mlp import grouped_mlp
from ..linear_attention import api as attention_api
from ..linear_attention import linear_attention
from ..token_conv import api as conv_api
from ..token_conv import token_conv2d

if TYPE_CHECKING:
    from .._common.kernel_call import KernelCall


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


class _Plan(NamedTuple):
    """How the kernels are launched one after the other."""

    attend: Callable[..., Tensor]
    scale: float
    attend_memo: Memo
    make_filters: Callable[..., Tensor]
    filters_memo: Memo | None
    taps: Callable[[Tensor], Tensor]
    convolve: "KernelCall"
    shape: tuple[int, int, int]


def _plan(
    tensors: tuple[Tensor, ...], feature_map: str, normalizer: str, eps: float,
    grid: tuple[int, int], prefix: int, groups: int | None, size: int | None,
) -> _Plan | None:  # fmt: skip
    """None where a kernel cannot run, or would need a tensor in another layout."""
    query, key, value, bias, *rest = tensors
    attended, scale, attend_memo = attention_api.CALLS(
        (query, key, value), feature_map, normalizer, None, eps, "auto"
    )
    if not attended or 0 in (*query.shape, *value.shape) or value.stride(3) != 1:
        return None
    values = value.flatten(2)
    shape = (*query.shape[:2], values.shape[2])
    filters_memo = None
    if groups is None or size is None:
        (weight,) = rest
    else:
        reason, filters_memo = mlp_api.CALLS(tuple(rest), groups, "auto")
        outputs = rest[3].shape[0]
        if outputs % size**2 or not mlp_api.takes_kernel("auto", query, reason):
            return None
        weight = rest[0].new_empty(len(rest[0]), outputs // size**2, size, size)
    out = query.new_empty(shape)
    convolved, _, _ = conv_api.CALLS((values, weight, bias, out), grid, prefix, "auto")
    copied = values.data_ptr() != value.data_ptr()
    if not convolved or copied or not (bias is None or bias.is_contiguous()):
        return None
    from ..grouped_mlp.triton_fwd import grouped_mlp_fwd
    from ..linear_attention.triton_fwd import linear_attention_fwd
    from ..token_conv.triton_fwd import PLANS, taps_of

    convolve = PLANS((values, weight, bias, out), prefix, *grid, False)
    return _Plan(
        linear_attention_fwd, scale, attend_memo, grouped_mlp_fwd, filters_memo,
        taps_of, convolve, shape,
    )  # fmt: skip


_PLANS = Plans(_plan)


def _launched(
    plan: _Plan, tensors: tuple[Tensor, ...],
    feature_map: str, normalizer: str, eps: float, groups: int | None,
) -> Tensor:  # fmt: skip
    query, key, value, bias, *rest = tensors
    attended = plan.attend(
        query, key, value, feature_map, normalizer, plan.scale, eps, memo=plan.attend_memo
    )
    if groups is None:
        taps = plan.taps(rest[0])
    else:
        taps = plan.make_filters(*rest, groups, memo=plan.filters_memo)
    out = empty(*plan.shape, like=query)
    with device_guard(query):
        # The kernel takes addresses and the strides of its plan; nobody looks at shapes.
        plan.convolve(value, taps, taps if bias is None else bias, attended, out)
    return out


def _composed(
    tensors: tuple[Tensor, ...],
    feature_map: str, normalizer: str, eps: float,
    grid: tuple[int, int], prefix: int, groups: int | None, size: int | None,
) -> Tensor:  # fmt: skip
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
    without views between and by one look-up: eager mode waits for the host.

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
    if not torch.compiler.is_compiling() and not is_dispatched(tensors):
        plan = _PLANS(tensors, *options)
        if plan is not None:
            return _launched(plan, tensors, feature_map, normalizer, eps, groups)
    return _composed(tensors, *options)
