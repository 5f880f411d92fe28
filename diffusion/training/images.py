"""The image sources that a recipe can name: digits, imagefolder and npz, all as uint8 tensors."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import find_classes, make_dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .config import DataConfig
from .npz_images import NpzArrays, PackedNpz, read_npz
from .verification import verify_files

logger = logging.getLogger(__name__)

# files, resolution -> whether each can be read
Verify = Callable[[Sequence[Path], int], list[bool]]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
SPLITS = ("all", "train", "test")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NUM_HELD_OUT_DIGITS = 297


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """Side, channels and resizing of the images that a source gives.

    Args:
        resolution: side of the square image in pixels.
        channels: 1 or 3; ``None`` keeps what the source has.
        center_crop: resize the short side and crop the middle; otherwise squash to a square.
        interpolation: nearest, bilinear or bicubic; all but nearest with antialiasing.
    Raises:
        ValueError: any of them outside its contract.
    """

    resolution: int
    channels: int | None = None
    center_crop: bool = True
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"`resolution` must be at least 1 pixel, got {self.resolution}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"`channels` must be 1, 3 or None, got {self.channels}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}, "
                f"got {self.interpolation!r}"
            )

    def fit(self, image: Tensor) -> Tensor:
        """uint8 ``(..., C, H, W)`` -> ``(..., channels or C, resolution, resolution)``."""
        if self.channels == 1 and image.shape[-3] == 3:
            image = to_grey(image)
        elif self.channels == 3 and image.shape[-3] == 1:
            image = F.grayscale_to_rgb(image)
        side = [self.resolution, self.resolution]
        if list(image.shape[-2:]) == side:
            return image
        size = side[:1] if self.center_crop else side
        mode = InterpolationMode(self.interpolation)
        image = F.resize(image, size, interpolation=mode, antialias=True)
        return F.center_crop(image, side) if self.center_crop else image


class ImageSource(Dataset, ABC):
    """Labelled images of one size, in a fixed order and without any random augmentation.

    Flips are the training loop's, drawn per step, so that a resumed run sees the same images.
    An item is ``{"image": uint8 (C, resolution, resolution), "label": int}``.

    Attributes:
        classes: class names; a label is an index into them.
        labels: ``(N,)`` int64.
        resolution, channels: size of every image, in pixels and channels.
    """

    def __init__(
        self, classes: list[str], labels: Tensor, image_format: ImageFormat, own_channels: int
    ) -> None:
        self.classes = classes
        self.labels = labels
        self.resolution = image_format.resolution
        self.channels = image_format.channels or own_channels
        self._format = image_format

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._format.fit(self._read(index))
        return {"image": image, "label": int(self.labels[index])}

    @abstractmethod
    def _read(self, index: int) -> Tensor:
        """uint8 ``(C, H, W)`` as stored."""


class DigitsImages(ImageSource):
    """scikit-learn's 1,797 handwritten digits (UCI, 8x8, 17 grey levels), resized.

    Args:
        image_format: size and channels of the images given.
        split: all, or one part of a fixed stratified division into 1,500 train and 297 test.
    """

    def __init__(self, image_format: ImageFormat, split: str = "all") -> None:
        digits = load_digits()
        rows = np.arange(len(digits.target))
        if split != "all":
            train, test = train_test_split(
                rows, test_size=NUM_HELD_OUT_DIGITS, random_state=0, stratify=digits.target
            )
            rows = np.sort(train if split == "train" else test)
        classes = [str(name) for name in digits.target_names]
        super().__init__(classes, torch.from_numpy(digits.target[rows]).long(), image_format, 1)
        grey = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
        # Small enough to resize once, not at every epoch.
        self._images = image_format.fit(torch.from_numpy(grey)[:, None])

    def _read(self, index: int) -> Tensor:
        return self._images[index]


class FolderImages(ImageSource):
    """Images ``path/<class>/**`` in RGB; the classes are the sub-folders in alphabetical order.

    Every file is decoded once here, so that a truncated one cannot stop a long training.

    Args:
        path: the folder.
        image_format: size and channels of the images given.
        verify: tells which of the files can be read at this resolution.
    Attributes:
        broken: files that cannot be decoded; they are named in one warning and left out.
    Raises:
        ValueError: no class folder, or no readable image.
    """

    def __init__(
        self, path: Path, image_format: ImageFormat, verify: Verify = verify_files
    ) -> None:
        if not path.is_dir():
            raise ValueError(f"`path` must be an existing folder of images, got {path}")
        folders = find_classes(path)[0] if any(p.is_dir() for p in path.iterdir()) else []
        # A hidden folder, of a notebook or a file manager, would shift every label.
        classes = [name for name in folders if not name.startswith(".")]
        if not classes:
            raise ValueError(f"`path` must hold one sub-folder per class, got {path} with none")
        class_to_idx = {name: label for label, name in enumerate(classes)}
        found = make_dataset(path, class_to_idx, IMAGE_EXTENSIONS, allow_empty=True)
        readable = verify([Path(file) for file, _ in found], image_format.resolution)
        self.broken = [Path(file) for (file, _), ok in zip(found, readable, strict=True) if not ok]
        kept = [item for item, ok in zip(found, readable, strict=True) if ok]
        if self.broken:
            names = ", ".join(str(file) for file in self.broken[:10])
            more = ", ..." if len(self.broken) > 10 else ""
            logger.warning("skipped %d broken images: %s%s", len(self.broken), names, more)
        if not kept:
            raise ValueError(
                f"`path` must hold at least one readable {'/'.join(IMAGE_EXTENSIONS)} image, "
                f"got {path} with {len(self.broken)} broken and none readable"
            )
        labels = torch.tensor([label for _, label in kept], dtype=torch.long)
        super().__init__(classes, labels, image_format, 3)
        self._files = [file for file, _ in kept]

    def _read(self, index: int) -> Tensor:
        with Image.open(self._files[index]) as image:
            return F.pil_to_tensor(_to_rgb(image))


class NpzImages(ImageSource):
    """uint8 images and labels of one ``.npz`` file, plain arrays or packed WebP/JPEG bytes.

    Raises:
        ValueError: keys, dtypes, lengths or labels that do not fit, with the file's name.
    """

    def __init__(self, path: Path, image_format: ImageFormat) -> None:
        if not path.is_file():
            raise ValueError(f"`path` must be an existing .npz file, got {path}")
        self._store: NpzArrays | PackedNpz = read_npz(path)
        labels = torch.from_numpy(self._store.labels.astype(np.int64))
        super().__init__(self._store.classes, labels, image_format, self._store.channels)

    def _read(self, index: int) -> Tensor:
        return torch.from_numpy(self._store.image(index)).permute(2, 0, 1)


def open_images(
    source: str,
    *,
    path: str | Path | None = None,
    resolution: int,
    channels: int | None = None,
    center_crop: bool = True,
    interpolation: str = "bicubic",
    split: str = "all",
    verify: Verify = verify_files,
) -> ImageSource:
    """Opens an image source by its name in a recipe.

    Args:
        source: digits, imagefolder or npz.
        path: class folders for imagefolder, the file for npz; digits takes none.
        resolution: side of the square images, in pixels.
        channels: 1 or 3; None keeps what the source has (digits 1, imagefolder 3).
        center_crop: resize the short side and crop the middle; otherwise squash to a square.
        interpolation: nearest, bilinear or bicubic.
        split: all, train or test; only digits has the last two.
        verify: which files of an imagefolder can be read; decodes them all unless given.
    Raises:
        ValueError: unknown name, missing path, or a path that holds no such data.
    """
    if source not in SOURCES:
        raise ValueError(f"`source` must be one of {', '.join(SOURCES)}, got {source!r}")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}")
    image_format = ImageFormat(
        resolution=resolution,
        channels=channels,
        center_crop=center_crop,
        interpolation=interpolation,
    )
    if source == "digits":
        if path is not None:
            raise ValueError(f"`path` must be None for source 'digits', got {path}")
        return DigitsImages(image_format, split)
    if split != "all":
        raise ValueError(f"`split` must be 'all' for source {source!r}, got {split!r}")
    if path is None:
        raise ValueError(f"`path` must be given for source {source!r}, got None")
    if source == "imagefolder":
        return FolderImages(Path(path), image_format, verify)
    return NpzImages(Path(path), image_format)


SOURCES = ("digits", "imagefolder", "npz")


def open_recipe_images(data: DataConfig, verify: Verify = verify_files) -> ImageSource:
    """`open_images` of what a recipe names."""
    return open_images(
        data.source,
        path=data.path,
        resolution=data.resolution,
        channels=data.channels,
        center_crop=data.center_crop,
        interpolation=data.image_interpolation_mode,
        split=data.split,
        verify=verify,
    )


def to_grey(image: Tensor) -> Tensor:
    """uint8 ``(..., 3, H, W)`` -> ``(..., 1, H, W)``; a grey image keeps its values."""
    # On uint8 torchvision cuts off instead of rounding, and grey 200 becomes 199.
    return F.rgb_to_grayscale(image.float()).round().to(torch.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to white instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
