"""Images with captions in a folder, and lists of prompts."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from .buckets import Size
from .images import IMAGE_EXTENSIONS

METADATA_NAME = "metadata.jsonl"


@dataclass(frozen=True)
class CaptionedImage:
    """An image file and what it shows.

    Attributes:
        name: path relative to the folder; without suffix where captions are files of their own.
        file: the image.
        caption: its text.
    """

    name: str
    file: Path
    caption: str

    def size(self) -> Size:
        """Height and width in pixels, as a viewer shows it; reads the header alone.

        Raises:
            ValueError: a file that is no image.
        """
        try:
            with Image.open(self.file) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF: rows and columns swapped
                return (image.width, image.height) if turned else (image.height, image.width)
        except OSError as error:
            raise ValueError(
                f"`path` must hold readable images, got {self.file}: {error}"
            ) from error

    def read(self) -> Tensor:
        """uint8 ``(3, H, W)``.

        Raises:
            ValueError: a file that cannot be decoded.
        """
        try:
            with Image.open(self.file) as image:
                return F.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"`path` must hold readable images, got {self.file}: {error}"
            ) from error


def read_captions(path: str | Path, caption_column: str = "text") -> list[CaptionedImage]:
    """The captioned images of a folder, sorted by name.

    Captions come from ``metadata.jsonl``, rows of `file_name` and `caption_column` as the
    imagefolder of datasets has it, or else from a ``name.txt`` beside every image.

    Args:
        path: the folder; images may lie in sub-folders.
        caption_column: key of the caption in ``metadata.jsonl``.

    Raises:
        ValueError: no folder or no image in it; an image without caption, or a caption without
            image, by name; a damaged row; a caption that is empty or no UTF-8.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"`path` must be an existing folder of images, got {folder}")
    visible = [file for file in sorted(folder.rglob("*")) if not _is_hidden(file, folder)]
    images = {
        file.relative_to(folder).as_posix(): file
        for file in visible
        if file.suffix.lower() in IMAGE_EXTENSIONS
    }
    if not images:
        raise ValueError(
            f"`path` must hold {'/'.join(IMAGE_EXTENSIONS)} images, got {folder} with none"
        )
    metadata = folder / METADATA_NAME
    if metadata.is_file():
        captions = _from_metadata(metadata, caption_column)
    else:
        texts = {
            file.relative_to(folder).with_suffix("").as_posix(): file
            for file in visible
            if file.suffix.lower() == ".txt"
        }
        repeated = Counter(Path(name).with_suffix("").as_posix() for name in images)
        if twice := [name for name, count in repeated.items() if count > 1]:
            raise ValueError(f"`path` must have one image a caption, got several of {twice[0]}")
        images = {Path(name).with_suffix("").as_posix(): file for name, file in images.items()}
        captions = {name: _read_text(file) for name, file in texts.items()}
    _check_pairs(folder, images, captions)
    return [CaptionedImage(name, images[name], captions[name]) for name in sorted(images)]


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are skipped.

    Raises:
        ValueError: no such file, no UTF-8, or nothing in it.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"`prompts` must be an existing text file, got {file}")
    lines = [line.strip() for line in _decode(file).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"`prompts` must hold at least one prompt, got {file} with none")
    return lines


def _unreadable(file: Path, error: Exception) -> str:
    return f"`path` must hold readable images, got {file}: {error}"


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _decode(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text, got {error}") from error


def _read_text(file: Path) -> str:
    text = " ".join(_decode(file).split())
    if not text:
        raise ValueError(f"{file} must hold a caption, got an empty file")
    return text


def _from_metadata(file: Path, caption_column: str) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, line in enumerate(_decode(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number} must be a JSON object, got {error}") from error
        keys = ("file_name", caption_column)
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) and row[key].strip() for key in keys
        ):
            raise ValueError(
                f"{file}:{number} must have the texts `file_name` and `{caption_column}`, got"
                f" {line[:80]}"
            )
        name = row["file_name"].removeprefix("./")
        if name in captions:
            raise ValueError(f"{file}:{number} must name a new image, got {name} again")
        captions[name] = row[caption_column].strip()
    return captions


def _check_pairs(folder: Path, images: Mapping[str, Path], captions: Mapping[str, str]) -> None:
    for what, names in (
        ("a caption for every image", sorted(set(images) - set(captions))),
        ("an image for every caption", sorted(set(captions) - set(images))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"`path` must hold {what}, got none for {', '.join(names[:3])}{more} in {folder}"
            )
