"""Linear attention in plain PyTorch: runs on every device, differentiates, serves as the oracle.

Legend: q, k, v are (B, H, N, D) after the feature map; s = state (B, H, D, E); M queries, N keys.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from .._common.precision import accumulation_dtype, no_autocast

FeatureMap = Callable[[Tensor], Tensor]
Normalizer = Callable[[Tensor, Tensor, Tensor, float, float, bool], Tensor]


def _elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


# A new member of the family is a row here and in NORMALIZERS, with its twin in the kernels.
FEATURE_MAPS: dict[str, FeatureMap] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "elu1": _elu1,
}


def _attend(q: Tensor, k: Tensor, v: Tensor, linear_order: bool) -> Tensor:
    """q k^T v in one of its two orders of multiplication, which agree up to rounding."""
    if linear_order:
        return q @ (k.transpose(-1, -2) @ v)  # (M, D) x (D, E)
    return (q @ k.transpose(-1, -2)) @ v  # (M, N) x (N, E)


def _unnormalized(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, order: bool) -> Tensor:
    return _attend(q * scale, k, v, order)


def _ratio(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, order: bool) -> Tensor:
    q = q * scale
    denominator = q @ k.sum(-2, keepdim=True).transpose(-1, -2) + eps  # (B, H, M, 1)
    return _attend(q, k, v, order) / denominator


def _covariance(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, order: bool) -> Tensor:
    # Subtracting the means before the product, not k_mean v_mean^T after it: the latter cancels
    # catastrophically once means exceed deviations.
    k_centred = k - k.mean(-2, keepdim=True)
    v_mean = v.mean(-2, keepdim=True)
    return _attend(q * (scale / k.shape[-2]), k_centred, v - v_mean, order) + v_mean


NORMALIZERS: dict[str, Normalizer] = {
    "ratio": _ratio,
    "covariance": _covariance,
    "none": _unnormalized,
}


def is_linear_order_cheaper(num_queries: int, num_keys: int, head_dim: int, value_dim: int) -> bool:
    """True iff M N (D + E) > D E (M + N), i.e. N > D in the square case."""
    quadratic = num_queries * num_keys * (head_dim + value_dim)
    return quadratic > head_dim * value_dim * (num_queries + num_keys)


def linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
    linear_order: bool | None = None,
) -> Tensor:
    """The operation of `api.linear_attention`; `linear_order=None` takes the cheaper order."""
    if linear_order is None:
        linear_order = is_linear_order_cheaper(
            query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        )
    dtype = accumulation_dtype(query.dtype)
    phi = FEATURE_MAPS[feature_map]
    with no_autocast(query.device.type):
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
        out = NORMALIZERS[normalizer](phi(q), phi(k), v, scale, eps, linear_order)
        return out.transpose(1, 2).to(query.dtype)
