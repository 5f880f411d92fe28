"""The two layouts of an .npz image file: plain arrays, and encoded images packed end to end."""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

_PACKED_KEYS = ("data", "lengths", "header_id", "headers", "header_lengths", "labels", "classes")


class NpzArrays:
    """``images`` uint8 ``(N, H, W, C)`` or ``(N, H, W)``, ``labels`` ``(N,)``, ``classes``."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        missing = [key for key in ("images", "labels") if key not in arrays]
        if missing:
            raise ValueError(
                f"{path} must hold the arrays `images` and `labels`, got {sorted(arrays)}"
            )
        images = arrays["images"]
        if images.dtype != np.uint8:
            raise ValueError(f"`images` of {path} must be uint8, got {images.dtype}")
        images = images[..., None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.size == 0:
            raise ValueError(
                f"`images` of {path} must have shape (N, H, W), (N, H, W, 1) or (N, H, W, 3) "
                f"without an empty side, got {arrays['images'].shape}"
            )
        self._images = images
        self.channels = images.shape[-1]
        self.labels, self.classes = _labels_and_classes(path, arrays, len(images), "classes")

    def image(self, index: int) -> np.ndarray:
        """uint8 ``(H, W, C)``."""
        return self._images[index]


class PackedNpz:
    """WebP or JPEG bytes end to end in ``data``, shared JPEG headers stored once in ``headers``.

    Image ``i`` is ``headers[header_id[i]]`` followed by its own slice of ``data``. Decoded per
    item, as the files are many times smaller than the pixels.
    """

    channels = 3

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        missing = [key for key in _PACKED_KEYS if key not in arrays]
        if missing:
            raise ValueError(f"{path} must hold {', '.join(_PACKED_KEYS)}, missing {missing}")
        ends = np.cumsum(arrays["lengths"], dtype=np.int64)
        header_ends = np.cumsum(arrays["header_lengths"], dtype=np.int64)
        num_images = len(arrays["lengths"])
        header_id = arrays["header_id"]
        consistent = (
            num_images > 0
            and len(header_ends) > 0
            and ends[-1] == arrays["data"].size
            and header_ends[-1] == arrays["headers"].size
            and header_id.shape == (num_images,)
            and int(header_id.max()) < len(header_ends)
        )
        if not consistent:
            raise ValueError(
                f"{path} must hold as many bytes and headers as its lengths say, "
                f"got {num_images} images and {arrays['data'].size} bytes"
            )
        # `classes` holds WordNet ids where `names` holds words.
        names_key = "names" if "names" in arrays else "classes"
        self.labels, self.classes = _labels_and_classes(path, arrays, num_images, names_key)
        self._path = path
        self._data = arrays["data"]
        self._starts, self._ends = ends - arrays["lengths"], ends
        self._header_id = header_id
        self._headers = [
            arrays["headers"][end - length : end].tobytes()
            for end, length in zip(header_ends, arrays["header_lengths"].astype(int), strict=True)
        ]

    def image(self, index: int) -> np.ndarray:
        """uint8 ``(H, W, 3)``."""
        body = self._data[self._starts[index] : self._ends[index]].tobytes()
        encoded = io.BytesIO(self._headers[self._header_id[index]] + body)
        try:
            return np.array(Image.open(encoded).convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"image {index} of {self._path} must be readable, got {error}"
            ) from error


def read_npz(path: Path) -> NpzArrays | PackedNpz:
    """Reads and checks an image file of either layout.

    Raises:
        ValueError: not an .npz file, or its arrays do not fit together.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"`path` must be a readable .npz file, got {path}: {error}") from error
    if "data" in arrays and "images" not in arrays:
        return PackedNpz(path, arrays)
    return NpzArrays(path, arrays)


def _labels_and_classes(
    path: Path, arrays: dict[str, np.ndarray], num_images: int, names_key: str
) -> tuple[np.ndarray, list[str]]:
    labels = arrays["labels"]
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"`labels` of {path} must be {num_images} integers, one per image, "
            f"got shape {labels.shape} and dtype {labels.dtype}"
        )
    if labels.min() < 0:
        raise ValueError(f"`labels` of {path} must not be negative, got {labels.min()}")
    if names_key not in arrays:
        return labels, [str(label) for label in range(int(labels.max()) + 1)]
    classes = [str(name) for name in arrays[names_key].ravel()]
    if labels.max() >= len(classes):
        raise ValueError(
            f"`labels` of {path} must be below its {len(classes)} classes, got {labels.max()}"
        )
    return labels, classes
