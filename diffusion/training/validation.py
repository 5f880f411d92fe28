"""Sample grids of a model in training."""

from pathlib import Path

import torch
from diffusers import DiTPipeline
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..sampling import balanced_labels, sample_images
from .config import ValidationConfig


def save_grid(images: torch.Tensor, file: Path, columns: int) -> None:
    """Writes uint8 images (N, C, H, W) as one PNG, enlarged so that small ones can be seen."""
    zoom = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    file.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(make_grid(images, nrow=columns, padding=2, pad_value=128)).save(file)


def validate(
    pipeline: DiTPipeline, config: ValidationConfig, num_classes: int, seed: int, file: Path
) -> None:
    """Samples the same noise and classes every time, so that grids of one run can be compared."""
    count = config.num_validation_images
    images = sample_images(
        pipeline,
        balanced_labels(count, num_classes),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=seed,
    )
    save_grid(images, file, columns=min(count, max(num_classes, 4), 10))
