"""Sample grids of a model in training."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..sampling import balanced_labels, sample_images
from .config import ValidationConfig
from .prompt_cache import PromptCache
from .text_pipelines import decode_latents, draw_latents


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


@torch.no_grad()
def validate_prompts(
    pipeline: DiffusionPipeline,
    cache: PromptCache,
    config: ValidationConfig,
    seed: int,
    file: Path,
) -> None:
    """Draws prompts of the cache, spread over the bucket that has most, always the same ones."""
    bucket = int(cache.bucket_of.bincount().argmax())
    rows = (cache.bucket_of == bucket).nonzero().flatten()
    count = config.num_validation_images
    images = []
    for number in range(count):
        item = cache[int(rows[number * len(rows) // count])]
        latents = draw_latents(
            pipeline,
            {name: item[name][None] for name in cache.empty},
            {name: value[None] for name, value in cache.empty.items()},
            cache.buckets[bucket],
            seeds=[seed + number],
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
        images.append(decode_latents(pipeline.vae, latents))
    save_grid(torch.cat(images), file, columns=min(count, 4))
