"""Root-mean-square normalisation and rotary positions of queries and keys in one pass."""

from .api import rotary_rms_norm

__all__ = ["rotary_rms_norm"]
