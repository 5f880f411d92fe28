"""Two grouped linear maps with a GELU between, in one launch."""

from .api import grouped_mlp

__all__ = ["grouped_mlp"]
