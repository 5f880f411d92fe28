"""Generated images against real ones: class accuracy and Frechet distance in a named space."""

from .evaluate import evaluate_images
from .features import FeatureSpace, check_feature_space, open_feature_space
from .frechet import frechet_distance

__all__ = [
    "FeatureSpace",
    "check_feature_space",
    "evaluate_images",
    "frechet_distance",
    "open_feature_space",
]
