"""Generated images against a data source: class accuracy and Frechet distance."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..training.images import ImageSource
from .class_names import imagenet_ranks
from .features import FeatureSpace
from .frechet import frechet_distance


@dataclass(frozen=True)
class Reference:
    """What a feature space makes of the real images.

    Attributes:
        features: ``(N, F)`` float32.
        accuracy: share of the images whose class the classifier sees.
    """

    features: Tensor
    accuracy: float


def analyse_reference(
    source: ImageSource, space: FeatureSpace, class_ids: list[int] | None = None
) -> Reference:
    """Looks at all images of `source` once, for many calls of `evaluate_images`.

    Raises:
        ValueError: classes that the classifier does not know, see `match_classes`.
    """
    ids = torch.tensor(match_classes(source.classes, space, class_ids))
    features, logits = _analyse_source(source, space)
    return Reference(features, _accuracy(logits[:, ids], source.labels))


def evaluate_images(
    images: Tensor,
    labels: Tensor | list[int] | None,
    source: ImageSource,
    space: FeatureSpace,
    class_ids: list[int] | None = None,
    reference: Reference | None = None,
) -> dict[str, Any]:
    """Measures generated images against real ones in one feature space.

    Args:
        images: uint8 ``(N, C, H, W)``, generated, of the size of the source's images.
        labels: ``(N,)`` classes that were asked for, indices into ``source.classes``; ``None``
            where they are unknown.
        source: the real images.
        space: features and classifier.
        class_ids: the classifier's class for each class of the source; ``None`` finds them by
            name (or by order, for all 1,000 WordNet ids of ImageNet).
        reference: of this source and space; ``None`` looks at all of the source's images.
    Returns:
        ``class_accuracy`` (share of images in which the classifier sees the class asked for rather
        than another one of the source's; ``None`` without labels), ``source_accuracy`` (the same
        of the real images, what a perfect generator would reach), ``frechet_distance``,
        ``num_images``, ``num_source_images``, ``space`` and its ``description``.
    Raises:
        ValueError: sizes, labels or class ids that do not fit.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(f"`images` must be (N, C, H, W) with N >= 2, got {tuple(images.shape)}")
    side = source.resolution
    if tuple(images.shape[-2:]) != (side, side):
        raise ValueError(
            f"`images` must have the source's size {side}x{side}, "
            f"got {images.shape[-2]}x{images.shape[-1]}"
        )
    # Before the images are looked at, which can take minutes.
    if labels is not None:
        labels = _checked_labels(labels, len(images), len(source.classes))
        ids = torch.tensor(match_classes(source.classes, space, class_ids))
    features, logits = space.analyse(images)
    accuracy = real_accuracy = None
    if reference is not None:
        real_features = reference.features
    else:
        real_features, real_logits = _analyse_source(source, space)
    if labels is not None:
        accuracy = _accuracy(logits[:, ids], labels)
        real_accuracy = (
            reference.accuracy
            if reference is not None
            else _accuracy(real_logits[:, ids], source.labels)
        )
    return {
        "class_accuracy": accuracy,
        "source_accuracy": real_accuracy,
        "frechet_distance": frechet_distance(features, real_features),
        "num_images": len(images),
        "num_source_images": len(source),
        "space": space.name,
        "description": space.description,
    }


def match_classes(
    classes: list[str], space: FeatureSpace, class_ids: list[int] | None = None
) -> list[int]:
    """The classifier's class for each class of a source, by name where no ids are given.

    Raises:
        ValueError: ids of a wrong number or out of range; names that the classifier lacks or has
            twice.
    """
    known = len(space.classes)
    if class_ids is not None:
        if len(class_ids) != len(classes) or not all(0 <= index < known for index in class_ids):
            raise ValueError(
                f"`class_ids` must be {len(classes)} numbers below {known}, got {class_ids}"
            )
        return list(class_ids)
    if classes == space.classes:
        return list(range(known))
    if (ranks := imagenet_ranks(classes, known)) is not None:
        return ranks
    names = [name.lower() for name in space.classes]
    unclear = [name for name in classes if names.count(name.lower()) != 1]
    if unclear:
        raise ValueError(
            f"`class_ids` must be given, as the classifier of {space.name!r} does not have these "
            f"classes once each by name, got {unclear[:5]}"
        )
    return [names.index(name.lower()) for name in classes]


def _checked_labels(labels: Tensor | list[int], num_images: int, num_classes: int) -> Tensor:
    labels = torch.as_tensor(labels, dtype=torch.long)
    if labels.shape != (num_images,):
        raise ValueError(
            f"`labels` must be {num_images} numbers, one per image, got {tuple(labels.shape)}"
        )
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(f"`labels` must be below {num_classes}, got {outside[0].item()}")
    return labels


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def _analyse_source(source: ImageSource, space: FeatureSpace) -> tuple[Tensor, Tensor]:
    loader = DataLoader(source, batch_size=space.batch_size)
    parts = [space.analyse(batch["image"]) for batch in loader]
    features, logits = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return features, logits
