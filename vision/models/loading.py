"""Fits saved weights to a model of another image size: position tables are resampled."""

import math
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from ..fold import FOLDABLE_NORMS, fold_norms

Grid = tuple[int, int]


def _source_grid(num_tokens: int, model: nn.Module) -> Grid:
    """The grid of a saved table: square, or of the aspect that the saved arguments tell."""
    side = math.isqrt(num_tokens)
    if side * side == num_tokens:
        return side, side
    size = getattr(model, "pretrained_model_args", {}).get("img_size")
    if size is not None and not isinstance(size, int):
        height = round(math.sqrt(num_tokens * size[0] / size[1]))
        if height and num_tokens % height == 0:
            return height, num_tokens // height
    raise ValueError(
        f"`state_dict` must hold position tables of square images to be resized, got {num_tokens}"
        " tokens"
    )


def _resize(name: str, value: Tensor, owner: Any, model: nn.Module) -> Tensor:
    leaf = name.rpartition(".")[2]
    target = getattr(owner, leaf)
    if leaf == "relative_position_bias_table":
        return resize_rel_pos_bias_table(
            value, new_window_size=owner.window_size, new_bias_shape=target.shape
        )
    prefix = getattr(owner, "num_prefix_tokens", 0) if leaf == "pos_embed" else 0
    source = _source_grid(value.shape[1] - prefix, model)
    if hasattr(owner, "resample_positions"):  # has a way of its own
        return owner.resample_positions(value, source, owner.table_grid)
    return resample_abs_pos_embed(
        value, new_size=list(owner.table_grid), old_size=list(source), num_prefix_tokens=prefix
    )


def _is_folded(state_dict: dict[str, Any], model: nn.Module) -> bool:
    """Whether the weights are those of a model without its foldable norms."""
    norms = [name for name, m in model.named_modules() if isinstance(m, FOLDABLE_NORMS)]
    return bool(norms) and not any(
        key.startswith(f"{name}.") for name in norms for key in state_dict
    )


def filter_checkpoint(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook before weights are loaded.

    Args:
        state_dict: weights by the names of `model`.
        model: the modules that own tables say with `table_grid` which grid they need.

    Returns:
        The weights, with position tables resampled where `model` has another image size. A model
        whose weights were saved after `fold_norms` is folded as well.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    if _is_folded(state_dict, model):
        fold_norms(model)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    tables = ("pos_embed", "positional_encoding", "relative_position_bias_table")
    filtered = {}
    for name, value in state_dict.items():
        path, _, leaf = name.rpartition(".")
        if leaf in tables and name in shapes and shapes[name] != value.shape:
            with torch.no_grad():
                value = _resize(name, value, model.get_submodule(path), model)
        filtered[name] = value
    return filtered
