"""Signature, checks and choice of implementation of local attention."""

from numbers import Integral, Real
from typing import NamedTuple

from torch import Tensor

from .._common.checks import IMPLEMENTATIONS, check_choice, check_grid, check_shape, check_tensor
from .._common.launch import takes_kernel, why_no_kernel
from .._common.plans import Memo, Plans
from .configs import MAX_HEAD_DIM, MAX_SIDE
from .ops import local_attention_op


def why_not_triton(query: Tensor, value: Tensor, grid: tuple[int, int]) -> str | None:
    """The reason why `impl="triton"` cannot run on these tensors, None if it can."""
    reason = why_no_kernel(query)
    if reason is not None:
        return reason
    head_dim, value_dim = query.shape[3], value.shape[3]
    if max(head_dim, value_dim) > MAX_HEAD_DIM or min(head_dim, value_dim) < 1:
        return f"its kernels take 1 to {MAX_HEAD_DIM} channels, got {head_dim} and {value_dim}"
    if max(grid) > MAX_SIDE:
        return f"its kernels take grid sides up to {MAX_SIDE}, got {grid[0]} x {grid[1]}"
    return None


def _check_number(name: str, value: object, kind: type, what: str) -> None:
    # A tensor among them would silently get no gradient.
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"`{name}` must be {what}, got {type(value).__name__}")


class _Call(NamedTuple):
    """What follows from the arguments: height, width, num_prefix, radius and scale, and whether
    the kernels run."""

    numbers: tuple[int, int, int, float, float]
    kernel: bool
    memo: Memo


def _checked(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    grid: tuple[int, int],
    radius: float,
    num_prefix: int,
    scale: float | None,
    impl: str,
    *_: type,
) -> _Call:
    """Raises what the arguments deserve."""
    query, key, value, extra_key, extra_value = tensors
    check_choice("impl", impl, IMPLEMENTATIONS)
    check_tensor("query", query, "(B, N, H, D)")
    check_tensor("key", key, "(B, N, H, D)", like=query)
    check_tensor("value", value, "(B, N, H, E)", like=query)
    batch, num_tokens, heads, head_dim = query.shape
    value_dim = value.shape[3]
    check_shape("key", key, query.shape, "(B, N, H, D)")
    check_shape("value", value, (batch, num_tokens, heads, value_dim), "(B, N, H, E)")

    _check_number("num_prefix", num_prefix, Integral, "an integer")
    if not 0 <= num_prefix < num_tokens:
        raise ValueError(f"`num_prefix` must be in [0, {num_tokens}), got {num_prefix}")
    height, width = check_grid(grid, num_tokens - num_prefix, "image tokens")
    _check_number("radius", radius, Real, "a number")
    if not radius >= 1:  # also refuses nan
        raise ValueError(f"`radius` must be at least 1, got {radius}")
    if scale is None:
        scale = head_dim**-0.5
    _check_number("scale", scale, Real, "a number or None")

    if (extra_key is None) != (extra_value is None):
        missing, given = ("extra_key", "extra_value")[:: 1 if extra_key is None else -1]
        raise ValueError(f"`{missing}` must be given together with `{given}`, got None")
    if extra_key is not None and extra_value is not None:
        check_tensor("extra_key", extra_key, "(B, M, H, D)", like=query)
        check_tensor("extra_value", extra_value, "(B, M, H, E)", like=query)
        num_extra = extra_key.shape[1]
        check_shape("extra_key", extra_key, (batch, num_extra, heads, head_dim), "(B, M, H, D)")
        extra_shape = (batch, num_extra, heads, value_dim)
        check_shape("extra_value", extra_value, extra_shape, "(B, M, H, E)")

    reason = why_not_triton(query, value, (height, width))
    if impl == "triton" and reason is not None:
        raise NotImplementedError(f"`impl` must not be 'triton' for local_attention: {reason}")
    numbers = (height, width, num_prefix, float(radius), float(scale))
    return _Call(numbers, takes_kernel(impl, query, reason), Memo())


_CALLS = Plans(_checked)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    radius: float,
    num_prefix: int = 0,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention in which an image token sees a disc around itself.

    ``o_i = sum_{j in V(i)} exp(scale q_i . k_j - lse_i) v_j``,
    ``lse_i = log sum_{j in V(i)} exp(scale q_i . k_j)``, where the visible keys V(i) are

    - for a prefix query (i < T): all T prefix and all h * w image tokens, no extra key;
    - for an image query: all prefix tokens, every extra key, and the image tokens with
      ``(y_i - y_j)^2 + (x_i - x_j)^2 < radius^2``, strictly.

    Keys split over devices or calls merge exactly: with o_p, lse_p of disjoint parts,
    ``lse = logsumexp_p lse_p`` and ``o = sum_p exp(lse_p - lse) o_p``. No mask over all pairs is
    built: time is O(N (radius^2 + T + M) (D + E)), memory O(N).

    CLEAR, Liu et al. 2024 (arXiv:2412.16112), Sec. 3; the extra keys are those of its
    down-sampled variant.

    Args:
        query: ``(B, N, H, D)``, N = T + h * w, prefix tokens first, then the image row-major;
            float16, bfloat16, float32 or float64; any strides.
        key: ``(B, N, H, D)``.
        value: ``(B, N, H, E)``; E may differ from D.
        grid: ``(h, w)``, in tokens.
        radius: of the disc, in tokens; at least 1, which shows an image query of the image only
            itself; may be fractional or exceed the grid.
        num_prefix: T, how many leading tokens (text) are not on the grid.
        scale: multiplies the logits; None means ``D ** -0.5``.
        extra_key: ``(B, M, H, D)``, keys without a place on the grid, seen by all image queries.
        extra_value: ``(B, M, H, E)``, given with `extra_key`.
        return_lse: return ``(o, lse)``; both differentiate, once.
        impl: ``auto``, ``reference`` (PyTorch, any device) or ``triton``. ``auto`` takes the
            Triton kernels on CUDA for float16, bfloat16 and float32, up to 128 channels and grid
            sides up to 16384.

    Returns:
        ``(B, N, H, E)`` in ``query.dtype``. With `return_lse` also ``(B, N, H)``, natural
        logarithm, in float32 (float64 for float64 inputs), the dtype of all sums, under any
        autocast.

    Raises:
        ValueError: shapes or devices disagree, a grid that does not hold the tokens, a radius
            below 1, one of `extra_key` and `extra_value` without the other.
        TypeError: dtypes that are not floating point or differ; a radius, scale or num_prefix
            that is no number.
        NotImplementedError: ``impl="triton"`` cannot run here.
    """
    tensors = (query, key, value, extra_key, extra_value)
    # Equal numbers of another type may not do: True is no radius, though 1 is.
    types = (type(radius), type(num_prefix), type(scale))
    call = _CALLS(tensors, grid, radius, num_prefix, scale, impl, *types)
    out, lse = local_attention_op(*tensors, *call.numbers, kernel=call.kernel, memo=call.memo)
    return (out, lse) if return_lse else out
