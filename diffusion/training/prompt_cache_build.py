"""Prompt caches of captioned images, and of images that a pipeline draws itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..models.autoencoder_pixel import PixelAutoencoder
from .buckets import Size, fit_to_bucket, nearest_bucket
from .latent_cache import scaled_posterior
from .prompt_cache import LATENTS, PromptCache
from .prompt_cache_writer import CacheWriter, Encoders, Item
from .text_pipelines import (
    TEXT_PIPELINES,
    draw_latents,
    encode_prompts,
    encoder_fingerprints,
    text_family,
)


class Captioned(Protocol):
    """An image with a caption; `CaptionedImage` is one on a disk."""

    @property
    def name(self) -> str: ...

    @property
    def caption(self) -> str: ...

    def size(self) -> Size:
        """Height and width in pixels."""
        ...

    def read(self) -> Tensor:
        """uint8 ``(C, H, W)``."""
        ...


def pipeline_encoders(
    pipeline: DiffusionPipeline, folder: str | Path, max_sequence_length: int | None = None
) -> Encoders:
    """The VAE and the text encoders of a pipeline.

    Args:
        pipeline: from `open_encoders`, on the device that shall work.
        folder: where it came from; its text encoders are fingerprinted there.
        max_sequence_length: tokens of a prompt; None for what the pipeline is made for.
    """
    family = text_family(pipeline)
    length = max_sequence_length
    if length is None:
        length = TEXT_PIPELINES[family].max_sequence_length
    return Encoders(
        family=family,
        vae=pipeline.vae,
        encode=lambda prompts: encode_prompts(pipeline, prompts, length),
        origin=str(folder),
        text_encoders=encoder_fingerprints(folder, family),
        max_sequence_length=length,
    )


def build_prompt_cache(
    encoders: Encoders,
    folder: str | Path,
    images: Sequence[Captioned],
    *,
    buckets: Sequence[Size],
    random_flip: bool = False,
    batch_size: int = 8,
    items_per_shard: int = 256,
) -> PromptCache:
    """Encodes captioned images and their captions once, for training.

    Every finished shard is kept: after an interruption, the same call goes on with the next. The
    folder appears under its name only when it is complete; until then it is a hidden ``.partial``
    folder beside it.

    Args:
        encoders: from `pipeline_encoders`, or of a study.
        folder: where the cache will be; must not exist yet, or be empty.
        images: from `read_captions`; each goes to the bucket of the nearest shape.
        buckets: from `parse_buckets`.
        random_flip: stores the mirrored images as well.
        batch_size: images encoded at once.
        items_per_shard: images in one file.

    Raises:
        ValueError: a folder in use, or of another call; buckets that do not fit the model; an
            image that cannot be read; latents or embeddings that are not finite.
    """
    # Pixels have no spread.
    latents = LATENTS[:1] if isinstance(encoders.vae, PixelAutoencoder) else LATENTS
    items = [
        Item(number, image.name, image.caption, nearest_bucket(image.size(), buckets))
        for number, image in enumerate(images)
    ]

    def encode(batch: Sequence[Item], size: Size, _: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = torch.stack([fit_to_bucket(images[i.number].read(), size) for i in batch])
        vae = encoders.vae
        values = pixels.to(vae.device, vae.dtype) / 127.5 - 1
        views = [values, values.flip(-1)] if random_flip else [values]
        posteriors = [scaled_posterior(vae, view) for view in views]
        parts = zip(*posteriors, strict=True)
        return {
            name: torch.stack(part, dim=1).cpu()
            for name, part in zip(LATENTS, parts, strict=True)
            if name in latents
        }

    source = {"kind": "images", "random_flip": random_flip}
    writer = CacheWriter(encoders, folder, buckets, items_per_shard)
    views = 2 if random_flip else 1
    return writer.write(items, encode, batch_size, source=source, num_views=views, latents=latents)


def build_teacher_cache(
    pipeline: DiffusionPipeline,
    encoders: Encoders,
    folder: str | Path,
    prompts: Sequence[str],
    *,
    buckets: Sequence[Size],
    num_inference_steps: int = 28,
    guidance_scale: float = 3.5,
    seed: int = 0,
    batch_size: int = 1,
    items_per_shard: int = 256,
) -> PromptCache:
    """A cache of latents that the pipeline itself draws: CLEAR's training data.

    Prompt i is drawn with seed ``seed + i`` in bucket ``i mod len(buckets)``. Other arguments, the
    way of resuming and errors are those of `build_prompt_cache`.

    Args:
        pipeline: from `open_encoders` with its transformer.
        prompts: from `read_prompts`.
        num_inference_steps, guidance_scale: of the pipeline.
    """
    items = [
        Item(number, f"{number:08d}", prompt, number % len(buckets))
        for number, prompt in enumerate(prompts)
    ]
    source = {
        "kind": "teacher",
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    writer = CacheWriter(encoders, folder, buckets, items_per_shard)

    def draw(batch: Sequence[Item], size: Size, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = draw_latents(
            pipeline,
            rows,
            {name: value[None] for name, value in writer.empty.items()},
            size,
            seeds=[seed + item.number for item in batch],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        return {"mean": latents[:, None]}

    return writer.write(items, draw, batch_size, source=source, num_views=1, latents=LATENTS[:1])
