"""Softmax attention of CSwin: half of the heads in vertical stripes, half in horizontal ones."""

from typing import Any

import torch
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

from lintra.kernels import token_conv2d

from .mixer import Grid


class CrossShapedWindowAttention(nn.Module):
    """``proj(softmax(q k^T / sqrt(D)) v + LePE(v))`` in stripes of the map.

    With two branches the first half of the channels attends in vertical stripes (h x split), the
    second in horizontal ones (split x w); one branch attends over the whole map. LePE is a 3x3
    depthwise convolution inside each stripe. Stripes that reach over the edge hold keys that are
    masked out, so that any map will do. Dong et al. 2022 (arXiv:2107.00652), Eq. 3-8.

    Args:
        dim: channels.
        num_heads: heads over all branches.
        split_size: width of the stripes, tokens.
        num_branches: 2, or 1 for the whole map.
        qkv_bias: the projection has a bias.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: int,
        num_branches: int = 2,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % num_heads or num_heads % num_branches:
            raise ValueError(
                f"`num_heads` must divide dim {dim} and be a multiple of {num_branches} branches,"
                f" got {num_heads}"
            )
        self.num_heads = num_heads
        self.split_size = split_size
        self.num_branches = num_branches
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        width = dim // num_branches
        self.lepe = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width, **dd) for _ in range(num_branches)
        )
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def input_layers(self) -> list[nn.Module]:
        """The layers that read the input: a norm before the attention folds into them."""
        return [self.qkv]

    def _stripe(self, branch: int, grid: Grid) -> Grid:
        height, width = grid
        if self.num_branches == 1:
            return height, width
        if branch == 0:
            return height, min(self.split_size, width)
        return min(self.split_size, height), width

    def _attend(self, qkv: Tensor, lepe: Any, stripe: Grid) -> Tensor:
        """``qkv`` (B, h, w, 3 C') to (B, h, w, C') within stripes."""
        _, height, width, channels = qkv.shape
        below, right = -height % stripe[0], -width % stripe[1]
        mask = None
        if below or right:
            qkv = F.pad(qkv, (0, 0, 0, right, 0, below))
            inside = torch.ones(1, height, width, 1, dtype=torch.bool, device=qkv.device)
            inside = window_partition(F.pad(inside, (0, 0, 0, right, 0, below)), stripe)
            # One row of key flags a stripe, for all samples, heads and queries.
            mask = inside.reshape(1, -1, 1, 1, stripe[0] * stripe[1])
        windows = window_partition(qkv, stripe).reshape(-1, stripe[0] * stripe[1], channels)
        heads = self.num_heads // self.num_branches
        q, k, v = windows.chunk(3, dim=-1)
        q, k, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        if mask is not None:
            num_stripes = mask.shape[1]
            q, k, values = (x.unflatten(0, (-1, num_stripes)) for x in (q, k, values))
        drop = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, values, attn_mask=mask, dropout_p=drop)
        if mask is not None:
            out = out.flatten(0, 1)
        out = out.transpose(1, 2).flatten(2)
        weight = lepe.weight.squeeze(1)
        out = token_conv2d(v, weight, lepe.bias, grid=stripe, residual=out)
        out = out.reshape(-1, *stripe, channels // 3)
        out = window_reverse(out, stripe, height + below, width + right)
        return out[:, :height, :width]

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``x`` (B, h * w, C), row-major on `grid`, to the same shape."""
        qkv = self.qkv(x).unflatten(1, grid)
        branches = qkv.unflatten(-1, (3, self.num_branches, -1)).unbind(-2)
        out = [
            self._attend(part.flatten(-2), lepe, self._stripe(index, grid))
            for index, (part, lepe) in enumerate(zip(branches, self.lepe, strict=True))
        ]
        return self.proj_drop(self.proj(torch.cat(out, dim=-1).flatten(1, 2)))
