"""Linear attention and the depthwise convolution of the values in one call."""

from .api import FilterMlp, linear_attention_conv2d

__all__ = ["FilterMlp", "linear_attention_conv2d"]
