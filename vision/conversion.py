"""Turns an official checkpoint into a folder that timm opens."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_for_hf

from .checkpoints import OfficialReport, extract_weights, load_official
from .unpickling import read_checkpoint_file

# Method of a repository -> what the names of its models hold.
METHODS = {"slab": ("_slab", "_prepbn"), "inline": ("_inline",)}


def official_models(method: str) -> list[str]:
    """Names of the models whose weights a repository has.

    Args:
        method: ``slab`` or ``inline``.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}")
    modules = ("linear_deit", "linear_swin", "linear_pvt", "linear_cswin")
    names = [name for module in modules for name in timm.list_models(module=module)]
    return sorted(name for name in names if any(mark in name for mark in METHODS[method]))


def convert_official(
    checkpoint: str | Path,
    model: str,
    folder: str | Path,
    *,
    method: str,
    prefer_ema: bool = True,
    **model_args: Any,
) -> OfficialReport:
    """Saves an official checkpoint as safetensors and timm configuration.

    ``timm.create_model("local-dir:<folder>", pretrained=True)`` opens the folder, once
    ``lintra.vision`` is imported. The number of classes is that of the checkpoint.

    Args:
        checkpoint: file of the authors.
        model: name of the architecture.
        folder: to write to; made if need be.
        method: ``slab`` or ``inline``, the repository of the checkpoint.
        prefer_ema: take averaged weights where the container has them.
        model_args: further arguments of the constructor.

    Returns:
        What was loaded, renamed, dropped and resized.

    Raises:
        ValueError: a name that the repository does not have, or see `load_official`.
    """
    names = official_models(method)
    if model not in names:
        raise ValueError(f"`model` must be one of {', '.join(names)}, got {model!r}")
    source, state = extract_weights(read_checkpoint_file(checkpoint), prefer_ema=prefer_ema)
    if "head.weight" in state:
        model_args.setdefault("num_classes", state["head.weight"].shape[0])
    network = timm.create_model(model, **model_args).eval()
    report = load_official(network, state)
    report.source = source
    with torch.no_grad():
        # timm records the arguments by itself only from 1.0.31 on.
        save_for_hf(network, folder, model_args=model_args, safe_serialization=True)
    return report
