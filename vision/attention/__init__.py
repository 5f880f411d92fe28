"""Token mixers of the backbones: one mixer, one file."""

from .inline import InLineAttention
from .mixer import LinearMixer
from .simplified_linear import SimplifiedLinearAttention

__all__ = ["InLineAttention", "LinearMixer", "SimplifiedLinearAttention"]
