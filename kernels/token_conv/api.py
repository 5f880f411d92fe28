"""Signature, checks and choice of implementation of the depthwise token convolution."""

from collections.abc import Sequence

from torch import Tensor

from .._common.checks import IMPLEMENTATIONS, check_choice, check_grid, check_shape, check_tensor
from .._common.launch import takes_kernel, why_no_kernel
from .._common.operators import unless_transformed
from .._common.plans import Memo, Plans
from .configs import MAX_SIZE
from .ops import token_conv2d_triton
from .reference import token_conv2d_reference


def why_not_triton(tokens: Tensor, weight: Tensor) -> str | None:
    """The reason why `impl="triton"` cannot run on these tensors, None if it can."""
    reason = why_no_kernel(tokens)
    if reason is None and weight.shape[-1] > MAX_SIZE:
        reason = f"its kernels take sizes up to {MAX_SIZE}, got {weight.shape[-1]}"
    return reason


def _checked(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    grid: Sequence[int],
    num_prefix_tokens: int,
    impl: str,
) -> tuple[bool, tuple[int, int], Memo]:
    """Raises what the arguments deserve; whether the kernels run, and the grid."""
    check_choice("impl", impl, IMPLEMENTATIONS)
    tokens, weight, bias, residual = tensors
    check_tensor("tokens", tokens, "(B, N, C)")
    batch, num_tokens, channels = tokens.shape
    if num_prefix_tokens < 0:
        raise ValueError(f"`num_prefix_tokens` must be 0 or more, got {num_prefix_tokens}")
    height, width = check_grid(grid, num_tokens - num_prefix_tokens)
    per_sample = isinstance(weight, Tensor) and weight.ndim == 4
    layout = "(B, F, k, k)" if per_sample else "(F, k, k)"
    check_tensor("weight", weight, layout, like=tokens, any_dtype=True)
    filters, size = weight.shape[-3], weight.shape[-1]
    kernel_shape = (filters, size, size)
    check_shape("weight", weight, (batch, *kernel_shape) if per_sample else kernel_shape, layout)
    if size % 2 == 0:
        raise ValueError(f"`weight` must have an odd kernel size, got {size}")
    if filters == 0 or channels % filters:
        raise ValueError(
            f"`weight` must have filters that divide the {channels} channels, got {filters}"
        )
    if bias is not None:
        check_tensor("bias", bias, "(F)", like=tokens, any_dtype=True)
        check_shape("bias", bias, (filters,), "(F)")
    if residual is not None:
        check_tensor("residual", residual, "(B, N, C)", like=tokens)
        check_shape("residual", residual, tokens.shape, "(B, N, C)")
    reason = why_not_triton(tokens, weight)
    if impl == "triton" and reason is not None:
        raise NotImplementedError(f"`impl` must not be 'triton' for token_conv2d: {reason}")
    return takes_kernel(impl, tokens, reason), (height, width), Memo()


CALLS = Plans(_checked)


def token_conv2d(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    residual: Tensor | None = None,
    num_prefix_tokens: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Same-padded depthwise 2-D convolution of tokens, added to `residual` in the same pass.

    ``out[b, y, x, c] = residual[b, y, x, c] + bias[f]
    + sum_{dy, dx} weight[f, dy, dx] tokens[b, y + dy - k // 2, x + dx - k // 2, c]``, f = c mod F,
    zeros outside the grid (cross-correlation, as everywhere in deep learning). Leading tokens off
    the grid are not convolved: there out is the residual, or zero.

    The local term of linear attention: 5x5 on the values in SLA (Guo et al. 2024,
    arXiv:2405.11582) and LiT (Wang et al. 2025, arXiv:2501.12976), 3x3 with a kernel per
    sample in InLine (Han et al. 2024, arXiv:2412.06590).

    Args:
        tokens: ``(B, N, C)``, N = num_prefix_tokens + h * w, row-major on `grid`; any floating
            dtype, any strides.
        weight: ``(F, k, k)``, or ``(B, F, k, k)`` for one kernel per sample; k odd. F = C, or a
            divisor of C for filters that heads of F channels share. Its floating dtype may differ
            from that of the tokens (float32 parameters under autocast).
        bias: ``(F)``, any floating dtype.
        grid: ``(h, w)``, in tokens.
        residual: ``(B, N, C)``, added to the result.
        num_prefix_tokens: tokens before those of the grid (a class token).
        impl: ``auto``, ``reference`` (PyTorch, any device) or ``triton``. ``auto`` takes the
            Triton kernels on CUDA for float16, bfloat16 and float32 and k <= 7, but not under
            `torch.func` or forward-mode derivatives. They differentiate once.

    Returns:
        ``(B, N, C)`` in ``tokens.dtype``; sums are float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or devices disagree, an even kernel size, filters that do not divide the
            channels, a grid that does not hold the tokens, a negative number of prefix tokens.
        TypeError: dtypes that are not floating point or differ.
        NotImplementedError: ``impl="triton"`` cannot run here.
    """
    kernel, grid, memo = CALLS((tokens, weight, bias, residual), grid, num_prefix_tokens, impl)
    if unless_transformed(kernel, impl, "token_conv2d"):
        return token_conv2d_triton(
            tokens, weight, bias, residual, num_prefix_tokens, *grid, memo=memo
        )
    return token_conv2d_reference(
        tokens, weight, bias, grid=grid, residual=residual, num_prefix_tokens=num_prefix_tokens
    )
