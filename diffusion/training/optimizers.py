"""Optimisers by the names that recipes use."""

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .config import TrainingConfig


def _adamw(config: TrainingConfig) -> tuple[type, dict[str, Any]]:
    return torch.optim.AdamW, {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }


def _prodigy(config: TrainingConfig) -> tuple[type, dict[str, Any]]:
    """With what CLEAR trains with; the learning rate is 1, the optimiser finds its own."""
    return _library("Prodigy"), {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decouple": True,
        "bias_correction": True,
        "safeguard_warmup": True,
    }


def _came(config: TrainingConfig) -> tuple[type, dict[str, Any]]:
    """Betas and eps are those of PixArt's and LiT's recipes."""
    return _library("CAME"), {"betas": (0.9, 0.999, 0.9999), "eps1": 1e-30, "eps2": 1e-16}


def _library(name: str) -> type:
    try:
        return getattr(importlib.import_module("pytorch_optimizer"), name)
    except ImportError as error:
        raise ValueError(
            f"`training.optimizer` must be adamw where pytorch_optimizer is not installed, got"
            f" {name.lower()}: pip install 'lintra[optimizers]'"
        ) from error


OPTIMIZERS: dict[str, Callable[[TrainingConfig], tuple[type, dict[str, Any]]]] = {
    "adamw": _adamw,
    "prodigy": _prodigy,
    "came": _came,
}


def make_optimizer(parameters: Iterable[Tensor], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of a recipe; `optimizer_arguments` have the last word.

    Raises:
        ValueError: its library is not installed, or arguments that it does not take.
    """
    cls, arguments = OPTIMIZERS[config.optimizer](config)
    common = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    try:
        return cls(list(parameters), **{**common, **arguments, **config.optimizer_arguments})
    except TypeError as error:
        raise ValueError(
            f"`training.optimizer_arguments` must be those of {cls.__name__}, got"
            f" {config.optimizer_arguments}: {error}"
        ) from error
