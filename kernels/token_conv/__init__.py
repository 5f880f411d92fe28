"""Depthwise convolution of tokens that lie on a grid."""

from .api import token_conv2d

__all__ = ["token_conv2d"]
