"""Parts of PVT and CSwin: patch embeddings, blocks and stages on channels-last maps."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models._features_fx import register_notrace_module
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn
from torch.nn import functional as F

from ..fold import Foldable, NormSite
from ..norm import NormFactory

Grid = tuple[int, int]


@register_notrace_module
class ConvEmbed(Foldable, nn.Module):
    """A strided convolution and a norm; the norm folds back into the convolution.

    Args:
        in_chans: channels of the image or map.
        dim: channels of the tokens.
        kernel_size: of the convolution, pixels.
        stride: pixels.
        padding: pixels.
        norm_layer: constructor of the norm.

    Shape:
        ``(B, C, H, W)`` to ``(B, h, w, dim)``.

    Raises:
        ValueError: an image smaller than the kernel.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel_size: int,
        stride: int,
        padding: int,
        norm_layer: NormFactory,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding, **dd)
        self.norm = norm_layer(dim, **dd)

    def output_grid(self, size: Grid) -> Grid:
        """Tokens for an image or map of `size`."""
        kernel, stride, padding = self.kernel_size, self.stride, self.padding
        if min(size) + 2 * padding < kernel:
            side = kernel - 2 * padding
            raise ValueError(
                f"`img_size` must give every stage a map of at least {side} x {side},"
                f" got {size[0]} x {size[1]}"
            )
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
        return height, width

    def norm_sites(self) -> list[NormSite]:
        return [NormSite(self, "norm", writer=self.proj)]

    def forward(self, x: Tensor) -> Tensor:
        self.output_grid((x.shape[2], x.shape[3]))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


@register_notrace_module
class HierarchicalBlock(Foldable, nn.Module):
    """Pre-norm attention and Mlp on a channels-last map.

    Args:
        dim: channels.
        attn: takes tokens (B, N, C) and their grid; says its `input_layers`.
        mlp_ratio: hidden channels of the Mlp, in units of `dim`.
        norm_layer: constructor of both norms.
        drop_path: rate of stochastic depth.
        proj_drop: dropout in the Mlp.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        norm_layer: NormFactory,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn: Any = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def norm_sites(self) -> list[NormSite]:
        return [
            NormSite(self, "norm1", readers=self.attn.input_layers()),
            NormSite(self, "norm2", readers=[self.mlp.fc1]),
        ]

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)  # (B, N, C)
        if getattr(self.attn, "reads_context", False):
            mixed = self.attn(self.norm1(x), grid, x)
        else:
            mixed = self.attn(self.norm1(x), grid)
        x = x + self.drop_path1(mixed)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.unflatten(1, grid)


@register_notrace_module
class HierarchicalStage(nn.Module):
    """Downsampling, an optional position table, and blocks.

    Args:
        downsample: ConvEmbed from the map before; Identity in the first stage.
        blocks: the blocks.
        grid: ``(h, w)``, the usual map.
        dim: channels.
        use_pos_embed: adds a learned table with a row a token, see `resample_positions` for others.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        grid: Grid,
        dim: int,
        use_pos_embed: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.table_grid = grid
        self.downsample = downsample
        self.pos_embed: nn.Parameter | None = None
        if use_pos_embed:
            table = torch.empty(1, grid[0] * grid[1], dim, device=device, dtype=dtype)
            self.pos_embed = nn.Parameter(table)
        self.blocks = nn.Sequential(*blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    @staticmethod
    def resample_positions(table: Tensor, source: Grid, grid: Grid) -> Tensor:
        """A position table of the grid `source` for another, as PVT's authors do it: bilinearly.

        Without antialiasing, which timm's own resampling has. Wang et al. 2021 (arXiv:2102.12122).

        Args:
            table: ``(1, h * w, C)``.
            source: its ``(h, w)``.
            grid: the new ``(h', w')``.

        Returns:
            ``(1, h' * w', C)``, interpolated in float32 or float64.
        """
        if grid == source:
            return table
        wide = table.to(torch.promote_types(torch.float32, table.dtype))
        plane = wide.transpose(1, 2).unflatten(2, source)
        resampled = F.interpolate(plane, size=grid, mode="bilinear")
        return resampled.flatten(2).transpose(1, 2).to(table.dtype)

    def _positions(self, table: Tensor, grid: Grid) -> Tensor:
        return self.resample_positions(table, self.table_grid, grid)

    def set_input_size(self, grid: Grid) -> None:
        """Makes `grid` the usual map; position tables are resized."""
        if self.pos_embed is not None:
            table = self._positions(self.pos_embed, grid).detach()
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.table_grid = grid
        block: Any
        for block in self.blocks:
            if hasattr(block.attn, "set_input_size"):
                block.attn.set_input_size(grid)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.downsample, nn.Identity):
            x = self.downsample(x.permute(0, 3, 1, 2))
        if self.pos_embed is not None:
            grid = (x.shape[1], x.shape[2])
            x = x + self._positions(self.pos_embed, grid).unflatten(1, grid)
        if self.grad_checkpointing and not torch.jit.is_tracing():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


def build_stage(
    downsample: nn.Module,
    mixers: Sequence[nn.Module],
    norms: Sequence[NormFactory],
    rates: Sequence[float],
    *,
    grid: Grid,
    dim: int,
    mlp_ratio: float,
    proj_drop: float,
    use_pos_embed: bool,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HierarchicalStage:
    """A stage of blocks around `mixers`, with a norm constructor and a drop path rate for each."""
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    blocks = [
        HierarchicalBlock(dim, mixer, mlp_ratio, norm, rate, proj_drop, **dd)
        for mixer, norm, rate in zip(mixers, norms, rates, strict=True)
    ]
    return HierarchicalStage(downsample, blocks, grid, dim, use_pos_embed, **dd)
