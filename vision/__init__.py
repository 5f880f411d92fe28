"""timm backbones with linear attention and foldable norms: SLAB, InLine and PRepBN."""

from .norm import PRepBN, RepBN
from .schedule import PRepBNSchedule, recalibrate_batchnorm

__all__ = ["PRepBN", "PRepBNSchedule", "RepBN", "recalibrate_batchnorm"]
