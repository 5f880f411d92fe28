"""Signature, checks and choice of implementation of the grouped MLP."""

from torch import Tensor

from .._common.checks import IMPLEMENTATIONS, check_choice, check_shape, check_tensor
from .._common.launch import takes_kernel, why_no_kernel
from .._common.operators import needs_gradient, reason_of_transforms
from .._common.plans import Memo, Plans
from .ops import grouped_mlp_triton
from .reference import grouped_mlp_reference

# A program holds both weights of a group and its hidden units in registers.
MAX_WIDTH = 128


def why_not_triton(x: Tensor, weight1: Tensor, groups: int) -> str | None:
    """The reason why `impl="triton"` cannot run on these tensors, None if it can."""
    reason = why_no_kernel(x)
    widths = x.shape[1] // groups, weight1.shape[0] // groups
    if reason is None and max(widths) > MAX_WIDTH:
        reason = f"its kernel takes groups of up to {MAX_WIDTH}, got {widths[0]} and {widths[1]}"
    return reason


def _checked(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], groups: int, impl: str
) -> tuple[str | None, Memo]:
    """Raises what the arguments deserve; why the kernel cannot run, None if it can."""
    check_choice("impl", impl, IMPLEMENTATIONS)
    x, weight1, bias1, weight2, bias2 = tensors
    check_tensor("x", x, "(B, C)")
    check_tensor("weight1", weight1, "(M, C / G, 1)", like=x, any_dtype=True)
    check_tensor("weight2", weight2, "(K, M / G, 1)", like=x, any_dtype=True)
    sizes = {"channels": x.shape[1], "hidden": weight1.shape[0], "outputs": weight2.shape[0]}
    if groups < 1 or any(size % groups or not size for size in sizes.values()):
        listed = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise ValueError(f"`groups` must be 1 or more and divide {listed}, got {groups}")
    channels, hidden, outputs = sizes.values()
    check_shape("weight1", weight1, (hidden, channels // groups, 1), "(M, C / G, 1)")
    check_shape("weight2", weight2, (outputs, hidden // groups, 1), "(K, M / G, 1)")
    for name, bias, layout, size in (
        ("bias1", bias1, "(M)", hidden),
        ("bias2", bias2, "(K)", outputs),
    ):
        check_tensor(name, bias, layout, like=x, any_dtype=True)
        check_shape(name, bias, (size,), layout)
    return why_not_triton(x, weight1, groups), Memo()


CALLS = Plans(_checked)


def grouped_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    groups: int,
    impl: str = "auto",
) -> Tensor:
    """``y_g = GELU(x_g W1_g^T + b1_g) W2_g^T + b2_g`` for each group g of channels, GELU by erf.

    The groups of all tensors lie one after the other: two `torch.nn.Conv1d` of kernel size 1 with
    `groups` and a GELU between, on one position. The weights of InLine's depthwise kernel are made
    so from the mean token, with a group a head (Han et al. 2024, arXiv:2412.06590, section 3.3).

    Args:
        x: ``(B, C)``, any floating dtype.
        weight1: ``(M, C / G, 1)``, M hidden units; any floating dtype.
        bias1: ``(M)``, any floating dtype.
        weight2: ``(K, M / G, 1)``, any floating dtype.
        bias2: ``(K)``, any floating dtype.
        groups: G, divides C, M and K.
        impl: ``auto``, ``reference`` (PyTorch, any device) or ``triton``. ``auto`` takes the Triton
            kernel on CUDA for float16, bfloat16 and float32, up to 128 channels and hidden units a
            group, where no gradient is asked for: one launch for eight.

    Returns:
        ``(B, K)`` in ``x.dtype``. Products take weights and hidden units rounded to ``x.dtype``,
        also under autocast; sums are float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or devices disagree, groups that do not divide, an unknown `impl`.
        TypeError: dtypes that are not floating point.
        NotImplementedError: ``impl="triton"`` cannot run here.
    """
    reason, memo = CALLS((x, weight1, bias1, weight2, bias2), groups, impl)
    if needs_gradient(x, weight1, bias1, weight2, bias2):
        reason = "its kernel has no gradient"
    reason = reason or reason_of_transforms()
    if impl == "triton" and reason is not None:
        raise NotImplementedError(f"`impl` must not be 'triton' for grouped_mlp: {reason}")
    if takes_kernel(impl, x, reason):
        return grouped_mlp_triton(x, weight1, bias1, weight2, bias2, groups, memo)
    return grouped_mlp_reference(x, weight1, bias1, weight2, bias2, groups)
