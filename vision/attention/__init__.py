"""Token mixers of the backbones: one mixer, one file."""

from typing import Any

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


def build_mixer(
    kind: str, dim: int, num_heads: int, *, sla_kernel_size: int = 5, **kwargs: Any
) -> LinearMixer:
    """The linear mixer of a block.

    Args:
        kind: ``sla`` or ``inline``.
        dim: channels.
        num_heads: heads.
        sla_kernel_size: side of SLA's depthwise convolution; InLine's is always 3.
        kwargs: see `LinearMixer`.
    """
    if kind == "sla":
        kwargs["kernel_size"] = sla_kernel_size
    return MIXERS[kind](dim, num_heads, **kwargs)


__all__ = [
    "MIXERS",
    "CrossShapedWindowAttention",
    "InLineAttention",
    "LinearMixer",
    "SimplifiedLinearAttention",
    "SpatialReductionAttention",
    "build_mixer",
]
