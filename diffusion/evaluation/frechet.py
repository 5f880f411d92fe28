"""The Frechet distance between two sets of features (Heusel et al. 2017, arXiv:1706.08500)."""

import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to the features, as FID is in Inception's space.

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` (Heusel et al. 2017, Eq. 6), with
    means ``mu`` and unbiased covariances ``S``. It is the square of a metric, in squared units of
    the features. It is biased upwards for few samples, so compare equal numbers of them.

    ``tr (S_a S_b)^(1/2)`` is taken from the symmetric ``R S_b R`` with ``R = S_a^(1/2)``, which has
    the same eigenvalues and stays real where covariances are singular (fewer samples than
    features).

    Args:
        features_a: ``(N, F)``, any floating dtype; all arithmetic is float64 on its device.
        features_b: ``(M, F)``.
    Raises:
        ValueError: not two-dimensional, different ``F``, fewer than 2 samples, not finite.
    """
    _check_features("features_a", features_a)
    _check_features("features_b", features_b)
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"`features_b` must have {features_a.shape[1]} features like `features_a`, "
            f"got {features_b.shape[1]}"
        )
    a, b = features_a.double(), features_b.to(features_a.device).double()
    cov_a, cov_b = _covariance(a), _covariance(b)
    root_a = _symmetric_root(cov_a)
    # Rounding leaves tiny negative eigenvalues where the true ones are zero.
    shared = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    distance = means + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(distance.item(), 0.0)


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"`{name}` must have shape (N, F), got {tuple(features.shape)}")
    if len(features) < 2:
        raise ValueError(f"`{name}` must have at least 2 samples, got {len(features)}")
    if not features.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity")


def _covariance(features: Tensor) -> Tensor:
    return torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
