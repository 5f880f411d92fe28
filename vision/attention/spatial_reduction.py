"""Softmax attention of PVT: keys and values from a strided convolution of the tokens."""

from typing import Any

import torch
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from ..fold import Foldable, NormSite
from ..norm import NormFactory
from .mixer import Grid


class SpatialReductionAttention(Foldable, Attention):
    """timm's attention of PVT v2 with a choice of norm after the strided convolution.

    Wang et al. 2021 (arXiv:2102.12122), Eq. 3-5.

    Args:
        dim: channels.
        num_heads: heads.
        sr_ratio: stride of the convolution, tokens; 1 has none.
        norm_layer: constructor of the norm after it.
        kwargs: see timm.

    Raises:
        ValueError: a map smaller than the stride.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        norm_layer: NormFactory,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, sr_ratio=sr_ratio, **kwargs, **dd)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.norm = norm_layer(dim, **dd)

    def input_layers(self) -> list[nn.Module]:
        """The layers that read the input: a norm before the attention folds into them."""
        return [self.q, self.kv if self.sr is None else self.sr]

    def norm_sites(self) -> list[NormSite]:
        return [] if self.sr is None else [NormSite(self, "norm", writer=self.sr)]

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if min(grid) < self.sr_ratio:
            raise ValueError(
                f"`grid` must be at least sr_ratio {self.sr_ratio} a side,"
                f" got {grid[0]} x {grid[1]}"
            )
        return super().forward(x, list(grid))
