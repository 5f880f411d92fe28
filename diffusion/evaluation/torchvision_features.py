"""Torchvision classifiers with local weights as feature spaces."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .features import FeatureSpace


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 RGB images to a model's input: ``(x * scale - mean) / std`` per channel.

    Args:
        size: side of the input; the whole image is resized, not cropped, so that its borders
            count too.
        mean, std: per channel, in the channel order of the model.
        scale: 1/255, or 1 for models that take 0 to 255.
        bgr: blue first.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 1 / 255
    bgr: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = F.grayscale_to_rgb(images)
        side = [self.size, self.size]
        mode = InterpolationMode.BILINEAR
        resized = F.resize(images, side, interpolation=mode, antialias=True).float()
        channels = resized.flip(1) if self.bgr else resized
        return F.normalize(channels * self.scale, list(self.mean), list(self.std))

    def __str__(self) -> str:
        order, top = ("BGR" if self.bgr else "RGB"), ("1" if self.scale < 1 else "255")
        return (
            f"images resized to {self.size}x{self.size} (antialiased bilinear), {order} 0..{top}, "
            f"minus {self.mean}, divided by {self.std}"
        )


# Weights that are not in torchvision's own image format: name -> model, preprocessing.
_SPECIAL = {
    "squeezenet1_0_caffe": (
        "squeezenet1_0",
        Preprocessing(224, (104.0, 117.0, 123.0), scale=1.0, bgr=True),
    ),
}
# Built as torchvision builds them for its own weights; by default they take other inputs.
_MODEL_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}


def space_names() -> list[str]:
    """Names that ``TorchvisionFeatures`` takes."""
    return [*_SPECIAL, *torchvision.models.list_models(module=torchvision.models)]


class TorchvisionFeatures(FeatureSpace):
    """The input of a classifier's last layer, averaged over space where it has any.

    Args:
        name: one of ``space_names()``.
        weights: local state dict with torchvision's names, 1,000 ImageNet classes.
        device: where the model runs.
        batch_size: images at once.
    Raises:
        ValueError: a file that is damaged, or not of this model.
    """

    def __init__(
        self,
        name: str,
        weights: Path,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 128,
    ) -> None:
        super().__init__(batch_size)
        model_name, preprocessing = _SPECIAL.get(name, (name, None))
        known = torchvision.models.get_model_weights(model_name).DEFAULT
        if preprocessing is None:
            preset = known.transforms()
            preprocessing = Preprocessing(
                preset.crop_size[0], tuple(preset.mean), tuple(preset.std)
            )
        model = torchvision.models.get_model(
            model_name, weights=None, **_MODEL_ARGUMENTS.get(model_name, {})
        )
        try:
            model.load_state_dict(_read_state_dict(weights))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"`weights` must be a state dict of torchvision's {model_name}, "
                f"got {weights}: {error}"
            ) from error
        self.name = name
        self.classes = list(known.meta["categories"])
        self._preprocessing = preprocessing
        self._device = torch.device(device)
        # Twice as fast on a CPU.
        model = model.to(self._device, torch.float32, memory_format=torch.channels_last)
        self._model = model.eval().requires_grad_(False)
        layer, self._head = _last_layer(model)
        self.description = (
            f"torchvision {model_name} with the weights {weights.name}; features are the input "
            f"of `{layer}`, averaged over space; {preprocessing}"
        )

    def _analyse_batch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        captured: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            logits = self._model(self._preprocessing(images.to(self._device)))
        finally:
            hook.remove()
        features = captured[0]
        return features.flatten(2).mean(2) if features.ndim == 4 else features, logits


def _last_layer(model: nn.Module) -> tuple[str, nn.Module]:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return layers[-1]


def _read_state_dict(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"`weights` must be a readable state dict, got {file}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"`weights` must be a flat state dict of tensors, got {file}")
    return state
