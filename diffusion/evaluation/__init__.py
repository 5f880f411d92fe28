"""Generated images against real ones: class accuracy and Frechet distance in a named space."""

from .compare import compare_images
from .evaluate import Reference, analyse_reference, evaluate_images, match_classes
from .features import FeatureSpace, check_feature_space, open_feature_space
from .frechet import frechet_distance
from .generated import kind_of_generated, read_generated, sample_generated
from .pictures import draw_rows

__all__ = [
    "FeatureSpace",
    "Reference",
    "analyse_reference",
    "check_feature_space",
    "compare_images",
    "draw_rows",
    "evaluate_images",
    "frechet_distance",
    "kind_of_generated",
    "match_classes",
    "open_feature_space",
    "read_generated",
    "sample_generated",
]
