"""Linear layers of one shape, wherever their weights lie, in one launch."""

from .api import stacked_linear
from .table import TensorTable

__all__ = ["TensorTable", "stacked_linear"]
