"""The backbones; importing this package registers their names with timm."""

from .linear_cswin import LinearCSwinTransformer
from .linear_deit import LinearVisionTransformer
from .linear_pvt import LinearPyramidTransformer
from .linear_swin import LinearSwinTransformer

__all__ = [
    "LinearCSwinTransformer",
    "LinearPyramidTransformer",
    "LinearSwinTransformer",
    "LinearVisionTransformer",
]
