"""Operations on tensors: linear attention, depthwise token convolution, local attention."""

from .linear_attention import linear_attention
from .local_attention import local_attention
from .token_conv import token_conv2d

__all__ = ["linear_attention", "local_attention", "token_conv2d"]
