"""Sampling images of given classes or embedded prompts, each from noise of its own seed."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
)
from torch import Tensor

from .training.text_pipelines import decode_latents, draw_latents

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
}
# DiTPipeline uses this label for "no class", whatever the model's own number of classes.
_NO_CLASS = 1000


def balanced_labels(num_images: int, num_classes: int) -> list[int]:
    """0, 1, ..., over and over: any prefix of k * num_classes labels is balanced."""
    return [index % num_classes for index in range(num_images)]


def sample_images(
    pipeline: DiTPipeline,
    labels: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    scheduler: str | None = None,
) -> Tensor:
    """Images of the classes `labels`; image i starts from the noise of seed + i, in any batch size.

    Args:
        pipeline: a `DiTPipeline` with a DiT or LiT.
        labels: class of each image.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance; 1 is none.
        seed: of the first image.
        batch_size: images computed at a time.
        scheduler: a key of `SCHEDULERS`; None keeps the pipeline's.

    Returns:
        uint8 ``(N, 3, H, W)`` on the CPU.

    Raises:
        ValueError: an unknown scheduler, labels out of range, guidance that the model's label
            table does not allow, a pipeline without autoencoder.
    """
    if pipeline.vae is None:
        raise ValueError(
            "`pipeline` must have a vae, got None: open it with load_pipeline(vae=...)"
        )
    classes = pipeline.transformer.config.num_embeds_ada_norm
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise ValueError(f"`scheduler` must be one of {', '.join(SCHEDULERS)}, got {scheduler!r}")
    if outside := [label for label in labels if not 0 <= label < classes]:
        raise ValueError(f"`labels` must be in 0 .. {classes - 1}, got {outside[0]}")
    if guidance_scale > 1 and classes != _NO_CLASS:
        raise ValueError(
            f"`guidance_scale` must be at most 1 for a model of {classes} classes, got"
            f" {guidance_scale}: DiTPipeline takes label {_NO_CLASS} for no class"
        )
    if scheduler is not None:
        config = pipeline.scheduler.config
        pipeline.scheduler = SCHEDULERS[scheduler].from_config(config)
    hidden = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    for start in range(0, len(labels), batch_size):
        part = list(labels[start : start + batch_size])
        generators = [
            torch.Generator().manual_seed(seed + start + index) for index in range(len(part))
        ]
        images = pipeline(
            class_labels=part,
            guidance_scale=guidance_scale,
            generator=generators,
            num_inference_steps=num_inference_steps,
            output_type="pt",
        ).images
        batches.append((images.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8))
    pipeline.set_progress_bar_config(**hidden)
    return torch.cat(batches)


@torch.no_grad()
def sample_prompts(
    pipeline: DiffusionPipeline,
    embeddings: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
    size: tuple[int, int],
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Images of embedded prompts; image i starts from the noise of seed + i, in any batch size.

    Args:
        pipeline: of FLUX, SD3 or PixArt, with a VAE and its own scheduler.
        embeddings: of the prompts, a row each, by the names that a `PromptCache` has.
        empty: of the empty prompt, without the row dimension.
        size: height and width in pixels.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance against the empty prompt, for FLUX by its
            `true_cfg_scale`; 1 is none.
        seed: of the first image.
        batch_size: images computed at a time.

    Returns:
        uint8 ``(N, 3, H, W)`` on the CPU.
    """
    count = len(next(iter(embeddings.values())))
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    for start in range(0, count, batch_size):
        rows = {name: value[start : start + batch_size] for name, value in embeddings.items()}
        latents = draw_latents(
            pipeline,
            rows,
            {name: value[None] for name, value in empty.items()},
            size,
            seeds=range(seed + start, seed + min(start + batch_size, count)),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=guidance_scale,
        )
        batches.append(decode_latents(pipeline.vae, latents))
    return torch.cat(batches)
