"""Token mixers of the backbones: one mixer, one file."""

from .cross_shaped import CrossShapedWindowAttention
from .inline import InLineAttention
from .mixer import LinearMixer
from .simplified_linear import SimplifiedLinearAttention
from .spatial_reduction import SpatialReductionAttention

# Rows of the option `attn` beside softmax.
MIXERS: dict[str, type[LinearMixer]] = {
    "sla": SimplifiedLinearAttention,
    "inline": InLineAttention,
}

__all__ = [
    "MIXERS",
    "CrossShapedWindowAttention",
    "InLineAttention",
    "LinearMixer",
    "SimplifiedLinearAttention",
    "SpatialReductionAttention",
]
