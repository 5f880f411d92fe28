"""Signature, checks and choice of implementation of linear attention."""

from torch import Tensor

from .._common.checks import IMPLEMENTATIONS, check_choice, check_shape, check_tensor
from .._common.launch import takes_kernel, why_no_kernel
from .._common.operators import unless_transformed
from .._common.plans import Memo, Plans
from .configs import MAX_HEAD_DIM
from .ops import linear_attention_triton
from .reference import FEATURE_MAPS, NORMALIZERS, linear_attention_reference


def why_not_triton(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """The reason why `impl="triton"` cannot run on these tensors, None if it can."""
    reason = why_no_kernel(query)
    if reason is None and not 1 <= query.shape[3] <= MAX_HEAD_DIM:
        reason = f"its kernels take 1 to {MAX_HEAD_DIM} head channels, got {query.shape[3]}"
    if reason is None and not 1 <= value.shape[3] <= MAX_HEAD_DIM:
        reason = f"its kernels take 1 to {MAX_HEAD_DIM} value channels, got {value.shape[3]}"
    return reason


def _checked(
    tensors: tuple[Tensor, Tensor, Tensor],
    feature_map: str,
    normalizer: str,
    scale: float | None,
    eps: float,
    impl: str,
) -> tuple[bool, float, Memo]:
    """Raises what the arguments deserve; whether the kernels run, and the scale."""
    check_choice("feature_map", feature_map, tuple(FEATURE_MAPS))
    check_choice("normalizer", normalizer, tuple(NORMALIZERS))
    check_choice("impl", impl, IMPLEMENTATIONS)
    query, key, value = tensors
    check_tensor("query", query, "(B, M, H, D)")
    batch, _, heads, head_dim = query.shape
    check_tensor("key", key, "(B, N, H, D)", like=query)
    check_tensor("value", value, "(B, N, H, E)", like=query)
    num_keys = key.shape[1]
    check_shape("key", key, (batch, num_keys, heads, head_dim), "(B, N, H, D)")
    check_shape("value", value, (batch, num_keys, heads, value.shape[3]), "(B, N, H, E)")
    if normalizer == "covariance" and num_keys == 0:
        raise ValueError("`key` must hold at least one token for normalizer 'covariance', got 0")
    reason = why_not_triton(query, key, value)
    if impl == "triton" and reason is not None:
        raise NotImplementedError(f"`impl` must not be 'triton' for linear_attention: {reason}")
    if scale is None:
        scale = head_dim**-0.5 if normalizer == "covariance" else 1.0
    return takes_kernel(impl, query, reason), scale, Memo()


CALLS = Plans(_checked)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "relu",
    normalizer: str = "ratio",
    scale: float | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Bidirectional linear attention around a state that does not grow with the tokens.

    With phi the feature map, S = sum_j phi(k_j) v_j^T, z = sum_j phi(k_j), N keys and s = `scale`:

    - ``ratio``: ``o_i = s phi(q_i) S / (s phi(q_i) . z + eps)``
    - ``covariance``: ``o_i = s phi(q_i) Cov(phi(k), v) + mean(v)``,
      ``Cov(k, v) = 1/N sum_j (k_j - mean(k)) (v_j - mean(v))^T``
    - ``none``: ``o_i = s phi(q_i) S``

    SLA and LiT are (relu, ratio); InLine is (identity, covariance), whose implied attention rows
    sum to one without a denominator. The linear order costs O(N D E), the quadratic order
    O(N^2 (D + E)); both give equal values and gradients. The reference runs the cheaper one, the
    kernels that which was measured to be faster, in both passes: the quadratic one for few tokens
    of heads of more than 64 channels, bfloat16 on Hopper.

    Katharopoulos et al. 2020 (arXiv:2006.16236), Eq. 4-6 without the causal mask; Han et al. 2024
    (arXiv:2412.06590) for ``covariance``.

    Args:
        query: ``(B, M, H, D)``, float16, bfloat16, float32 or float64; any strides.
        key: ``(B, N, H, D)``; N may differ from M.
        value: ``(B, N, H, E)``; E may differ from D.
        feature_map: ``identity``, ``relu`` or ``elu1`` (1 + elu).
        normalizer: ``ratio``, ``covariance`` or ``none``.
        scale: multiplies phi(query); None means 1 for ratio and none, ``D ** -0.5`` for covariance.
        eps: added to the denominator of ``ratio``, in units of phi(q) . z; unused otherwise.
        impl: ``auto``, ``reference`` (PyTorch, any device) or ``triton``. ``auto`` takes the
            Triton kernels on CUDA for float16, bfloat16 and float32 and up to 320 channels, but not
            under `torch.func` or forward-mode derivatives. They differentiate once.

    Returns:
        ``(B, M, H, E)`` in ``query.dtype``. State and sums are float32 (float64 for float64
        inputs) whatever the inputs and under any autocast.

    Raises:
        ValueError: shapes or devices disagree, an unknown name, no keys with ``covariance``.
        TypeError: dtypes that are not floating point or differ.
        NotImplementedError: ``impl="triton"`` cannot run here.
    """
    kernel, scale, memo = CALLS((query, key, value), feature_map, normalizer, scale, eps, impl)
    if unless_transformed(kernel, impl, "linear_attention"):
        options = (feature_map, normalizer, float(scale), float(eps))
        return linear_attention_triton(query, key, value, *options, memo=memo)
    return linear_attention_reference(
        query, key, value, feature_map=feature_map, normalizer=normalizer, scale=scale, eps=eps
    )
