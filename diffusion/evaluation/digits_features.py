"""A scikit-learn network trained on the 8x8 digits: the feature space of the digits data."""

import warnings
from functools import lru_cache

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..training.images import DigitsImages, ImageFormat, to_grey
from .features import FeatureSpace

_SIDE = 8
_HIDDEN = (256, 64)
# Pixels of the 32-pixel image, i.e. half a pixel of the 8x8 one.
_SHIFTS = ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2))


class DigitsFeatures(FeatureSpace):
    """Last hidden layer (64 channels) of scikit-learn's MLPClassifier; trained at first use.

    It takes some seconds once a process. The seed is fixed, so that numbers can be compared. It
    learns from the ``train`` split of the digits only, and also from copies that were enlarged,
    shifted and reduced again, as generated images are.
    """

    name = "digits"

    def __init__(self, batch_size: int = 128) -> None:
        super().__init__(batch_size)
        network, accuracy = _trained_network()
        self.held_out_accuracy = accuracy
        self.classes = [str(name) for name in network.classes_]
        self.description = (
            f"scikit-learn MLPClassifier with hidden layers {_HIDDEN}, trained on the 1,500 "
            "digits of the train split (random_state=0), accuracy "
            f"{accuracy:.4f} on the 297 others; features are the {_HIDDEN[-1]} activations of its "
            "last hidden layer; images are reduced to one channel and 8x8 (antialiased bilinear)"
        )
        self._layers = [
            (torch.from_numpy(weight).float(), torch.from_numpy(bias).float())
            for weight, bias in zip(network.coefs_, network.intercepts_, strict=True)
        ]

    def _analyse_batch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.from_numpy(_pixels(images)).float()
        for weight, bias in self._layers[:-1]:
            hidden = (hidden @ weight + bias).relu()
        weight, bias = self._layers[-1]
        return hidden, hidden @ weight + bias


@lru_cache(maxsize=1)
def _trained_network() -> tuple[MLPClassifier, float]:
    (images, labels), (held_out, held_out_labels) = _digits("train"), _digits("test")
    large = F.resize(images, [32, 32], interpolation=InterpolationMode.BICUBIC, antialias=True)
    copies = [F.affine(large, 0.0, list(shift), 1.0, [0.0]) for shift in _SHIFTS]
    inputs = np.concatenate([_pixels(images), *(_pixels(copy) for copy in copies)])
    targets = labels.repeat(1 + len(copies)).numpy()
    network = MLPClassifier(_HIDDEN, random_state=0, max_iter=30, n_iter_no_change=30)
    # The number of epochs is a choice, not a failure to converge.
    # One thread: matrices this small only wait for each other on more.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(inputs, targets)
    return network, float(network.score(_pixels(held_out), held_out_labels.numpy()))


def _digits(split: str) -> tuple[Tensor, Tensor]:
    source = DigitsImages(ImageFormat(resolution=_SIDE), split)
    return torch.stack([source[index]["image"] for index in range(len(source))]), source.labels


def _pixels(images: Tensor) -> np.ndarray:
    """uint8 ``(N, C, H, W)`` -> ``(N, 64)`` in [0, 1]."""
    if images.shape[1] == 3:
        images = to_grey(images)
    mode = InterpolationMode.BILINEAR
    small = F.resize(images, [_SIDE, _SIDE], interpolation=mode, antialias=True)
    return (small.flatten(1).double() / 255).cpu().numpy()
