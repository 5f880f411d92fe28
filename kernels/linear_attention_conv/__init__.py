"""Linear attention and the depthwise convolution of the values in one call."""

from .api import linear_attention_conv2d
from .composition import FilterMlp

__all__ = ["FilterMlp", "linear_attention_conv2d"]
