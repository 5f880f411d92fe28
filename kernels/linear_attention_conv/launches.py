"""Linear attention with a local term: its kernels, planned by one look-up and launched in a row."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .._common.launch import device_guard, empty
from .._common.plans import Memo, Plans
from ..grouped_mlp import api as mlp_api
from ..linear_attention import api as attention_api
from ..token_conv import api as conv_api
from .composition import Tensors, composed

if TYPE_CHECKING:
    from .._common.kernel_call import KernelCall


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
    tensors: Tensors, feature_map: str, normalizer: str, eps: float,
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
    from ..token_conv.triton_fwd import PLANS as CONV_PLANS
    from ..token_conv.triton_fwd import taps_of

    convolve = CONV_PLANS((values, weight, bias, out), prefix, *grid, False)
    return _Plan(
        linear_attention_fwd, scale, attend_memo, grouped_mlp_fwd, filters_memo,
        taps_of, convolve, shape,
    )  # fmt: skip


PLANS = Plans(_plan)


def launched(
    plan: _Plan, tensors: Tensors,
    feature_map: str, normalizer: str, eps: float, groups: int | None,
) -> Tensor:  # fmt: skip
    """The kernels of `plan`, one after the other, on its tensors."""
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


def linear_attention_conv2d_fwd(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rest: Sequence[Tensor],
    feature_map: str, normalizer: str, eps: float, height: int, width: int, prefix: int,
    groups: int | None, size: int | None,
) -> Tensor:  # fmt: skip
    """The operation of `api.linear_attention_conv2d` without a gradient: `rest` is a weight, or the
    five tensors of a `FilterMlp`."""
    tensors = (query, key, value, bias, *rest)
    options = (feature_map, normalizer, eps, (height, width), prefix, groups, size)
    plan = PLANS(tensors, *options)
    if plan is None:
        return composed(tensors, *options)
    return launched(plan, tensors, feature_map, normalizer, eps, groups)
