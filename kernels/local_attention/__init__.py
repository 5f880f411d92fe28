"""Exact softmax attention of image tokens inside a disc, of text tokens everywhere."""

from .api import local_attention

__all__ = ["local_attention"]
