"""What PVT and CSwin share: four stages of blocks on channels-last maps, in timm's manner."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    Mlp,
    get_device_dtype,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_module
from timm.models._manipulate import checkpoint_seq, named_apply
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn

from ..fold import Foldable, NormSite
from ..norm import NormFactory
from .readout import FoldableReadout, exempt_from_decay

try:  # timm >= 1.0.31 records the size, so that `save_for_hf` saves it
    from timm.models._input import update_model_input_size
except ImportError:
    update_model_input_size = None

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
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding, **dd)
        self.norm = norm_layer(dim, **dd)

    def output_grid(self, size: Grid) -> Grid:
        """Tokens for an image or map of `size`."""
        (kernel, _), (stride, _), (padding, _) = (
            self.proj.kernel_size,
            self.proj.stride,
            self.proj.padding,
        )
        if min(size) + 2 * padding < kernel:
            side = kernel - 2 * padding
            raise ValueError(
                f"`img_size` must give every stage a map of at least {side} x {side},"
                f" got {size[0]} x {size[1]}"
            )
        return tuple((side + 2 * padding - kernel) // stride + 1 for side in size)

    def norm_sites(self) -> list[NormSite]:
        return [NormSite(self, "norm", writer=self.proj)]

    def forward(self, x: Tensor) -> Tensor:
        self.output_grid(x.shape[-2:])
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
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
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
        use_pos_embed: adds a learned table with a row a token, resampled for other maps.
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
        self.pos_embed = None
        if use_pos_embed:
            table = torch.empty(1, grid[0] * grid[1], dim, device=device, dtype=dtype)
            self.pos_embed = nn.Parameter(table)
        self.blocks = nn.Sequential(*blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    def _positions(self, grid: Grid) -> Tensor:
        if grid == self.table_grid:
            return self.pos_embed
        return resample_abs_pos_embed(
            self.pos_embed,
            new_size=list(grid),
            old_size=list(self.table_grid),
            num_prefix_tokens=0,
        )

    def set_input_size(self, grid: Grid) -> None:
        """Makes `grid` the usual map; position tables are resized."""
        if self.pos_embed is not None:
            table = self._positions(grid).detach()
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.table_grid = grid
        for block in self.blocks:
            if hasattr(block.attn, "set_input_size"):
                block.attn.set_input_size(grid)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.downsample, nn.Identity):
            x = self.downsample(x.permute(0, 3, 1, 2))
        if self.pos_embed is not None:
            grid = (x.shape[1], x.shape[2])
            x = x + self._positions(grid).unflatten(1, grid)
        if self.grad_checkpointing and not torch.jit.is_tracing():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class HierarchicalBackbone(FoldableReadout, nn.Module):
    """A stem, stages, an optional final norm, pooling and a classifier.

    Args:
        stem: ConvEmbed on the image.
        stages: the stages.
        dims: channels of each stage.
        final_norm: module after the last stage, or Identity.
        img_size: the usual image, ``(height, width)``; any other is taken as well.
        in_chans: channels of the image.
        num_classes: 0 for features.
        global_pool: as timm's ClassifierHead.
        drop_rate: dropout before the classifier.
        weight_init: see timm's SwinTransformer.
    """

    def __init__(
        self,
        stem: ConvEmbed,
        stages: Sequence[HierarchicalStage],
        dims: Sequence[int],
        final_norm: nn.Module,
        img_size: int | Grid,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        weight_init: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.output_fmt = "NHWC"
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.img_size = to_2tuple(img_size)
        self.num_features = dims[-1]
        self.patch_embed = stem
        self.stages = nn.Sequential(*stages)
        self.norm = final_norm
        self.fc_norm = nn.Identity()
        self.head = ClassifierHead(
            dims[-1],
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            device=device,
            dtype=dtype,
        )
        self.head_hidden_size = self.head.num_features
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**index, "module": f"stages.{index}"}
            for index, dim in enumerate(dims)
        ]
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """See timm's SwinTransformer; convolutions keep PyTorch's initialisation."""
        mode = mode or self.weight_init_mode
        named_apply(get_init_weights_vit(mode, needs_reset=needs_reset), self)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: position tables and RepBN skips."""
        return exempt_from_decay(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups, see timm."""
        fine = [
            (r"^stages\.(\d+)\.(?:downsample|pos_embed)", (0,)),
            (r"^stages\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes blocks a second time in the backward pass to save memory."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier, an Identity without classes."""
        return self.head.fc

    def set_input_size(self, img_size: int | Grid) -> None:
        """Makes `img_size` the usual one: position tables are resized once instead of each time.

        Args:
            img_size: ``(height, width)``, pixels.
        """
        size = to_2tuple(img_size)
        grids = [self.patch_embed.output_grid(size)]
        for stage in self.stages[1:]:
            grids.append(stage.downsample.output_grid(grids[-1]))
        for stage, grid in zip(self.stages, grids, strict=True):
            stage.set_input_size(grid)
        self.img_size = size
        if update_model_input_size is not None:
            update_model_input_size(self, size)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of several stages.

        Args:
            x: image ``(B, C, H, W)``.
            indices: the last n stages if int, all if None, else these.
            norm: apply the final norm to the last stage's feature.
            stop_early: do not run stages after the last one asked for.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: leave out the final feature.

        Returns:
            The intermediates, or the final feature and them.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"`output_fmt` must be NCHW or NHWC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        intermediates = []
        x = self.patch_embed(x)
        for index, stage in enumerate(stages):
            x = stage(x)
            is_last = index == len(self.stages) - 1
            if index in take:
                feature = self.norm(x) if norm and is_last else x
                if output_fmt == "NCHW":
                    feature = feature.permute(0, 3, 1, 2).contiguous()
                intermediates.append(feature)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(stages) == len(self.stages) else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the features at `indices` do not need; returns the indices kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        is_shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or is_shortened:
            self.norm = nn.Identity()
        if is_shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or is_shortened:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier.

        Args:
            num_classes: 0 removes it.
            global_pool: None keeps the pooling.
        """
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool
        self.head_is_folded = False

    def forward_features(self, x: Tensor) -> Tensor:
        """Image ``(B, C, H, W)`` to the last stage's normed map ``(B, h, w, C)``."""
        return self.norm(self.stages(self.patch_embed(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
