"""Named feature spaces with a classifier, and the table that opens one by its name."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor


class FeatureSpace(ABC):
    """A frozen classifier whose penultimate features measure images.

    Attributes:
        name: key of the table.
        description: which model, weights, layer and preprocessing, in one sentence.
        classes: name of each prediction.
    """

    name: str
    description: str
    classes: list[str]

    def __init__(self, batch_size: int = 128) -> None:
        self.batch_size = batch_size

    def features(self, images: Tensor) -> Tensor:
        """uint8 ``(N, C, H, W)`` -> float32 ``(N, F)``."""
        return self.analyse(images)[0]

    def predict(self, images: Tensor) -> Tensor:
        """uint8 ``(N, C, H, W)`` -> class ``(N,)`` int64, an index into ``classes``."""
        return self.analyse(images)[1].argmax(1)

    @torch.no_grad()
    def analyse(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(N, F)`` and logits ``(N, K)`` of one pass, float32 on the CPU, in batches.

        Raises:
            TypeError: not uint8.  ValueError: not ``(N, 1 or 3, H, W)``, or no image.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"`images` must be uint8, got {images.dtype}")
        if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
            raise ValueError(f"`images` must be (N, 1 or 3, H, W), got {tuple(images.shape)}")
        parts = [self._analyse_batch(batch) for batch in images.split(self.batch_size)]
        features, logits = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
        return features.float(), logits.float()

    @abstractmethod
    def _analyse_batch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(n, F)`` and logits ``(n, K)``."""


def check_feature_space(name: str, weights: str | Path | None = None) -> None:
    """Says whether ``open_feature_space`` can open this space, without reading any weights.

    Raises:
        ValueError: unknown name, weights missing or given where there are none.
    """
    from . import torchvision_features

    if name == "digits":
        if weights is not None:
            raise ValueError(f"`weights` must be None for the space 'digits', got {weights}")
        return
    if name not in torchvision_features.space_names():
        raise ValueError(
            "`space` must be 'digits', 'squeezenet1_0_caffe' or a torchvision classification "
            f"model such as 'resnet50', got {name!r}"
        )
    if weights is None:
        raise ValueError(f"`weights` must be given for the space {name!r}, got None")
    if not Path(weights).is_file():
        raise ValueError(f"`weights` must be an existing file, got {weights}")


def open_feature_space(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
) -> FeatureSpace:
    """Opens a feature space; nothing is ever downloaded.

    Args:
        name: ``digits`` (a small network trained here on scikit-learn's digits),
            ``squeezenet1_0_caffe`` (torchvision's SqueezeNet 1.0 with weights in Caffe's image
            format), or any torchvision classification model.
        weights: local state dict (``.safetensors``, or a file of ``torch.save``); none for digits.
        device: where torchvision models run.
        batch_size: images at once.
    Raises:
        ValueError: unknown name, or weights that are missing, damaged or of another model.
    """
    check_feature_space(name, weights)
    if name == "digits":
        from .digits_features import DigitsFeatures

        return DigitsFeatures(batch_size)
    from .torchvision_features import TorchvisionFeatures

    assert weights is not None  # as checked
    return TorchvisionFeatures(name, Path(weights), device=device, batch_size=batch_size)
