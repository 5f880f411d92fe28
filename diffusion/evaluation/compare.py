"""How far a student's samples are from its teacher's, image by image and as a set."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .features import FeatureSpace
from .frechet import frechet_distance


def compare_images(images: Tensor, others: Tensor, space: FeatureSpace) -> dict[str, float]:
    """Measures pairs of images, such as those of two models from the same noise.

    Args:
        images: uint8 ``(N, C, H, W)``.
        others: uint8 ``(N, C, H, W)``; image i belongs to image i.
        space: of the features f.

    Returns:
        ``rms``, the root of the mean squared difference of all pixels, in levels of 255;
        ``cosine``, the mean over pairs of ``f . f' / (|f| |f'|)``; and ``frechet``, the Frechet
        distance of the two sets, which does not know of pairs.

    Raises:
        ValueError: sets of different shapes.
    """
    if images.shape != others.shape:
        raise ValueError(
            f"`others` must have the shape of `images`, {tuple(images.shape)}, got"
            f" {tuple(others.shape)}"
        )
    pairs = zip(images.split(space.batch_size), others.split(space.batch_size), strict=True)
    squares = sum((a.double() - b.double()).square().sum() for a, b in pairs)
    features, theirs = space.features(images), space.features(others)
    return {
        "rms": float(torch.as_tensor(squares / images.numel()).sqrt()),
        "cosine": F.cosine_similarity(features, theirs).mean().item(),
        "frechet": frechet_distance(features, theirs),
    }
