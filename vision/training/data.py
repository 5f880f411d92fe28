"""Labelled images for training: an image folder by timm, or an .npz of arrays or encoded images."""

import io
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .config import DataConfig

Transform = Callable[[Image.Image], Tensor]


class NpzImages(Dataset):
    """Images of one .npz file.

    Either ``images`` uint8 ``(N, H, W, 3)`` or ``(N, H, W)``; or encoded images end to end, image i
    being ``headers[header_id[i]]`` followed by its slice of ``data``. With ``labels`` ``(N)`` and
    perhaps ``classes``.

    Args:
        path: the file.

    Raises:
        ValueError: not such a file.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as archive:
                self.arrays = dict(archive)
            self.labels = self.arrays["labels"].astype(np.int64)
            if "images" not in self.arrays:
                self.ends = np.cumsum(self.arrays["lengths"], dtype=np.int64)
                self.starts = self.ends - self.arrays["lengths"]
                header_ends = np.cumsum(self.arrays["header_lengths"], dtype=np.int64)
                self.headers = [
                    self.arrays["headers"][end - length : end].tobytes()
                    for end, length in zip(
                        header_ends, self.arrays["header_lengths"].astype(int), strict=True
                    )
                ]
            count = len(self.arrays["images"]) if "images" in self.arrays else len(self.ends)
            if count != len(self.labels) or count == 0:
                raise ValueError(f"{count} images and {len(self.labels)} labels")
        except (KeyError, ValueError, OSError, EOFError, AttributeError) as error:
            raise ValueError(
                f"`data.train` and `data.val` must be .npz files of images and labels,"
                f" got {str(path)!r}: {error}"
            ) from error
        classes = self.arrays.get("classes")
        self.num_classes = len(classes) if classes is not None else int(self.labels.max()) + 1
        self.transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def _image(self, index: int) -> Image.Image:
        if "images" in self.arrays:
            return Image.fromarray(self.arrays["images"][index])
        body = self.arrays["data"][self.starts[index] : self.ends[index]].tobytes()
        header = self.headers[self.arrays["header_id"][index]]
        return Image.open(io.BytesIO(header + body))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._image(index).convert("RGB")
        return self.transform(image) if self.transform else image, int(self.labels[index])


def seed_everything(*words: int) -> None:
    """Seeds all generators that augmentation, mixup and dropout draw from, from several numbers."""
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that timm draws from
    torch.manual_seed(seed)


class SeededImages(Dataset):
    """Images whose augmentation depends on seed, epoch and index alone.

    So it is the same with any number of worker processes and in a resumed run.

    Args:
        images: the dataset.
        seed: of the run; set `epoch` before each pass.
    """

    def __init__(self, images: Any, seed: int) -> None:
        self.images = images
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        seed_everything(self.seed, self.epoch, index)
        return self.images[index]


def open_images(source: str, path: str) -> Any:
    """The dataset of `source`, with attributes `transform` and `num_classes`.

    Raises:
        ValueError: no images there.
    """
    if source == "npz":
        return NpzImages(path)
    try:
        images = create_dataset("", root=path, search_split=False)
        classes = images.reader.class_to_idx
    except RuntimeError as error:  # timm's word for a folder without images
        raise ValueError(
            f"`data.train` and `data.val` must be folders with a folder of images a class,"
            f" got {path!r}: {error}"
        ) from error
    images.num_classes = len(classes)
    return images


def _at_least_one_bit(level_fn: Callable[..., tuple[int]], *args: Any) -> tuple[int]:
    return (max(1, *level_fn(*args)),)


def _guard_posterize(transform: Any) -> Any:
    """timm's strongest posterize keeps 0 bits, at which Pillow >= 12 raises: keep one."""
    for step in transform.transforms:
        for op in getattr(step, "ops", []):
            if op.name.startswith("Posterize"):
                op.level_fn = partial(_at_least_one_bit, op.level_fn)
    return transform


def image_size(model: nn.Module) -> tuple[int, int]:
    """``(height, width)`` that a model was built for; its cfg tells that of published weights."""
    size = getattr(model, "img_size", None)
    size = size or getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = size or resolve_model_data_config(model)["input_size"][1:]
    return height, width


def make_loader(
    images: Any, config: DataConfig, model: nn.Module, *, is_training: bool, seed: int = 0
) -> DataLoader:
    """Batches of augmented images, or for evaluation of images cropped as the model's cfg says.

    Args:
        images: a dataset; gets its transform here.
        config: batch size and augmentation.
        model: its data configuration gives size, crop, mean and deviation.
        is_training: shuffle, augment and leave out the last incomplete batch.
        seed: of the augmentation.
    """
    cfg = resolve_model_data_config(model)
    transform = create_transform(
        (cfg["input_size"][0], *image_size(model)),
        is_training=is_training,
        no_aug=config.no_aug,
        scale=config.scale,
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        re_prob=config.reprob,
        re_mode="pixel",
        interpolation=config.interpolation,
        mean=cfg["mean"],
        std=cfg["std"],
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"],
    )
    images.transform = _guard_posterize(transform)
    val_size = config.val_batch_size or config.batch_size
    return DataLoader(
        SeededImages(images, seed) if is_training else images,
        batch_size=config.batch_size if is_training else val_size,
        shuffle=is_training,
        drop_last=is_training,
        num_workers=config.workers,
        pin_memory=True,
    )
