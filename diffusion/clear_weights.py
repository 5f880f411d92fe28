"""Official CLEAR weights (Liu et al. 2024, arXiv:2412.16112) into our models."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .models.clear import ClearMixin

_FILE_NAME = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?$")
_POOLING = ".processor.spatial_weight"
_TRAINED = ("to_q", "to_k", "to_v", "to_out", "processor")


def clear_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that CLEAR trains and publishes, out of those of `model`.

    Query, key, value and output projections of the image (of text and image in FLUX's single
    blocks, which have no output projection) and the pooling kernels; 380 of FLUX.

    Raises:
        ValueError: `model` is no CLEAR model.
    """
    if not isinstance(model, ClearMixin):
        raise ValueError(f"`model` must be a CLEAR model, got a {type(model).__name__}")
    prefixes = tuple(
        f"{layer}.{part}." for layer in model.attention_layer_names() for part in _TRAINED
    )
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def official_variant(path: str | Path) -> tuple[int, int | None] | None:
    """Radius and down factor in the official name of a file, None for another name.

    The radius is not in the weights, so that the name is all that tells it.
    """
    match = _FILE_NAME.match(Path(path).stem)
    return match and (int(match[1]), int(match[2]) if match[2] else None)


def pooling_factors(weights: Mapping[str, Tensor]) -> set[int]:
    """Down factors of the pooling kernels among `weights`: empty without, one in a sound file."""
    kernels = [tensor for name, tensor in weights.items() if name.endswith(_POOLING)]
    return {kernel.shape[3] for kernel in kernels if kernel.ndim == 7}


def _check_variant(model: ClearMixin, path: Path) -> None:
    variant = official_variant(path)
    if variant is None:
        return
    radius, down_factor = variant
    config = model.config
    if (config.radius, config.down_factor) != variant:
        raise ValueError(
            f"`weights` must be those of radius {config.radius}, down_factor {config.down_factor},"
            f" got {path.name}, of radius {radius}, down_factor {down_factor}"
        )


def read_clear_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: no such file. ValueError: one that is cut off or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`weights` must be a safetensors file, but there is no {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`weights` must be a safetensors file, got {path}: {error}") from error


@torch.no_grad()
def load_clear_weights(model: nn.Module, weights: str | Path | Mapping[str, Tensor]) -> None:
    """Replaces the parameters of `model` that CLEAR trains by those of an official checkpoint.

    The layout is flat: ``<block>.attn.to_{q,k,v}``, ``<block>.attn.to_out.0``, each with weight
    and bias, and with pooled keys ``<block>.attn.processor.spatial_weight``. Parameters are
    replaced, not written into: a teacher that shares the old ones keeps them. The weights are
    converted to the model's dtype and device.

    Licence: the official weights derive from FLUX.1-dev, which is not free for commercial use.

    Args:
        model: a CLEAR model of the radius and down factor of the weights.
        weights: a safetensors file, or names -> tensors. If the file has an official name,
            `clear_local_<radius>[_down_<factor>]`, radius and factor are compared with it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no CLEAR model, another variant, names or shapes that differ, fused
            projections. The model is then unchanged.
    """
    names = clear_parameter_names(model)
    assert isinstance(model, ClearMixin)
    if any(layer.fused_projections for _, _, layer in model._attention_layers()):
        raise ValueError("`model` must not have fused projections: unfuse_qkv_projections() first")
    if not isinstance(weights, Mapping):
        _check_variant(model, Path(weights))
        weights = read_clear_file(weights)
    parameters = dict(model.named_parameters())
    factors = pooling_factors(weights)
    down_factor = model.config.down_factor
    if factors != ({down_factor} if down_factor else set()):
        raise ValueError(
            f"`weights` must be those of down_factor {down_factor}, got pooling kernels of"
            f" {sorted(factors) or None}"
        )
    problems = [f"{name} is missing" for name in names if name not in weights]
    problems += [f"{name} is left over" for name in weights if name not in names]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(parameters[name].shape)}"
        for name in names
        if name in weights and weights[name].shape != parameters[name].shape
    ]
    if problems:
        raise ValueError(
            f"`weights` must hold the {len(names)} tensors that CLEAR trains, got {len(problems)}"
            f" problems: {'; '.join(problems[:3])}"
        )
    values = {
        name: weights[name].to(parameters[name].device, parameters[name].dtype, copy=True)
        for name in names
    }
    model.load_state_dict(values, strict=False, assign=True)
