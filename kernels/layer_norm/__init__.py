"""Layer normalisation of narrow tokens."""

from .api import layer_norm

__all__ = ["layer_norm"]
