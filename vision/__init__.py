"""timm backbones with linear attention and foldable norms: SLAB, InLine and PRepBN.

Importing this package registers every model with timm.
"""

from . import models
from .checkpoints import OfficialReport, load_official
from .fold import fold_norms
from .norm import PRepBN, RepBN
from .schedule import PRepBNSchedule, recalibrate_batchnorm

__all__ = [
    "OfficialReport",
    "PRepBN",
    "PRepBNSchedule",
    "RepBN",
    "fold_norms",
    "load_official",
    "models",
    "recalibrate_batchnorm",
]
