"""The backbone around the stages of PVT and CSwin, in timm's manner."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, get_device_dtype, to_2tuple
from timm.models._features import feature_take_indices
from timm.models._manipulate import named_apply
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn

from .readout import FoldableReadout, exempt_from_decay
from .stages import ConvEmbed, Grid, HierarchicalStage

try:  # timm >= 1.0.31 records the size, so that `save_for_hf` saves it
    from timm.models._input import update_model_input_size
except ImportError:
    update_model_input_size = None


class HierarchicalBackbone(FoldableReadout):
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
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier, an Identity without classes."""
        return self.head.fc

    def set_input_size(
        self, img_size: int | Grid | None = None, patch_size: int | None = None
    ) -> None:
        """Makes `img_size` the usual one: position tables are resized once instead of each time.

        Args:
            img_size: ``(height, width)``, pixels; None keeps it.
            patch_size: only for the signature that timm's models share: 4 or None.

        Raises:
            ValueError: another patch size, or an image too small for the stages.
        """
        if patch_size not in (None, 4, (4, 4)):
            raise ValueError(f"`patch_size` must be 4, got {patch_size}")
        size = self.img_size if img_size is None else to_2tuple(img_size)
        stage: Any
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
