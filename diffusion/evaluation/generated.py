"""Where generated images come from: a folder or file of them, or a pipeline that is sampled."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training.images import ImageSource, open_images
from .class_names import imagenet_ranks


def kind_of_generated(path: str | Path) -> str:
    """``pipeline``, ``imagefolder`` or ``npz``.

    Raises:
        ValueError: there is no such folder or file.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".npz":
        return "npz"
    if path.is_dir():
        return "pipeline" if (path / "model_index.json").is_file() else "imagefolder"
    raise ValueError(f"`generated` must be an existing folder or .npz file, got {path}")


def read_generated(
    path: str | Path,
    source: ImageSource,
    *,
    center_crop: bool = True,
    interpolation: str = "bicubic",
) -> tuple[Tensor, Tensor]:
    """All images of class folders or an .npz file, made as large as the source's.

    Args:
        path: folder ``<class>/*.png`` or file; classes bear the names of the source's classes or
            their numbers.
        source: the real images.
        center_crop, interpolation: how images of another size are resized.
    Returns:
        uint8 ``(N, C, resolution, resolution)`` and labels ``(N,)``, indices into
        ``source.classes``.
    Raises:
        ValueError: no readable image, or classes that the source does not have.
    """
    generated = open_images(
        kind_of_generated(path),
        path=path,
        resolution=source.resolution,
        channels=source.channels,
        center_crop=center_crop,
        interpolation=interpolation,
    )
    known = source.classes
    ids = [
        known.index(name) if name in known else int(name) if name.isdecimal() else -1
        for name in generated.classes
    ]
    unknown = [n for n, i in zip(generated.classes, ids, strict=True) if not 0 <= i < len(known)]
    if unknown:
        raise ValueError(
            f"`generated` must have the classes of the data by name or number, {known[:10]}, "
            f"got {unknown[:10]} in {path}"
        )
    images = torch.stack([generated[index]["image"] for index in range(len(generated))])
    return images, torch.tensor(ids)[generated.labels]


def sample_generated(
    path: str | Path,
    source: ImageSource,
    *,
    num_images: int,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    scheduler: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Images sampled from a pipeline folder, balanced over the source's classes.

    Returns:
        uint8 ``(num_images, 3, H, W)`` and labels ``(num_images,)``, indices into
        ``source.classes``.
    Raises:
        ValueError: a pipeline without these classes, or of another image size.
    """
    from ..io import load_pipeline
    from ..sampling import balanced_labels, sample_images

    pipeline = load_pipeline(Path(path).absolute()).to(device)
    # DiTPipeline's table of names; a pipeline without one has the classes of the data.
    known = getattr(pipeline, "labels", None) or {n: i for i, n in enumerate(source.classes)}
    ranks = imagenet_ranks(source.classes, pipeline.transformer.config.num_embeds_ada_norm)
    if ranks is not None:
        known = dict(zip(source.classes, ranks, strict=True))
    missing = [name for name in source.classes if name not in known]
    if missing:
        raise ValueError(
            f"`generated` must be a pipeline that knows the classes of the data, "
            f"got {list(known)[:10]} without {missing[:10]}"
        )
    labels = balanced_labels(num_images, len(source.classes))
    asked = [known[source.classes[label]] for label in labels]
    options: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "batch_size": batch_size,
        "scheduler": scheduler,
    }
    # One image first, as a thousand take minutes.
    height, width = sample_images(pipeline, asked[:1], **options).shape[-2:]
    if (height, width) != (source.resolution, source.resolution):
        raise ValueError(
            f"`resolution` must be the size of the pipeline's images, {height}x{width}, "
            f"got {source.resolution}"
        )
    return sample_images(pipeline, asked, **options), torch.tensor(labels)
