"""From what a recipe names to clean latents (or pixels) on the device."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from .assemble import Models
from .batches import flip_half
from .config import Recipe
from .families import Condition
from .images import ImageSource
from .latent_cache import LatentCache, build_latent_cache, scaled_posterior, weights_fingerprint
from .memory import InMemoryImages, InMemoryPrompts
from .prompt_cache import EMBEDDINGS, PromptCache
from .shards import INDEX_NAME


def check_images_fit(images: ImageSource, models: Models) -> None:
    """Raises ValueError unless autoencoder and student take images of this size and channels."""
    config = models.vae.config
    if images.channels != config.in_channels:
        raise ValueError(
            f"`data.channels` must be the {config.in_channels} of the autoencoder,"
            f" got {images.channels}"
        )
    reduction = 2 ** (len(config.block_out_channels) - 1)
    expected = models.student.config.sample_size * reduction
    if images.resolution != expected:
        raise ValueError(
            f"`data.resolution` must be {expected}, the model's sample size"
            f" {models.student.config.sample_size} times {reduction}, got {images.resolution}"
        )


class TrainingData:
    """The data set of a run and the way from one of its batches to x_0.

    Args:
        recipe: `data` and `model.vae` are read.
        images: the opened image source.
        models: their autoencoder encodes.
        accelerator: its main process makes the latent cache if the recipe names one that is
            missing.
    """

    def __init__(
        self, recipe: Recipe, images: ImageSource, models: Models, accelerator: Accelerator
    ):
        self.vae = models.vae
        self.random_flip = recipe.data.random_flip
        self.device = accelerator.device
        self.dataset: ImageSource | LatentCache | InMemoryImages = images
        if recipe.data.in_memory:
            self.dataset = InMemoryImages(images, self.device)
        folder = recipe.data.latent_cache
        if folder is None:
            return
        if models.in_pixel_space:
            raise ValueError(f"`data.latent_cache` must be none in pixel space, got {folder!r}")
        if accelerator.is_main_process and not (Path(folder) / INDEX_NAME).is_file():
            build_latent_cache(
                images,
                self.vae,
                folder,
                batch_size=recipe.training.train_batch_size,
                device=self.device,
                random_flip=self.random_flip,
                vae_id=recipe.model.vae or str(recipe.model.pretrained_teacher_model),
                resolution=images.resolution,
                num_workers=recipe.data.dataloader_num_workers,
            )
        accelerator.wait_for_everyone()
        cache = LatentCache(
            folder,
            vae_fingerprint=weights_fingerprint(self.vae),
            resolution=images.resolution,
        )
        if len(cache) != len(images) or (cache.num_views == 2) != self.random_flip:
            raise ValueError(
                f"`data.latent_cache` must hold {len(images)} images"
                f" {'with' if self.random_flip else 'without'} mirrored ones, got {len(cache)}"
                f" {'with' if cache.num_views == 2 else 'without'} in {folder}"
            )
        self.dataset = cache

    @torch.no_grad()
    def prepare(
        self, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Condition]:
        """x_0 (B, C, h, w) float32 and the labels (B,) of a collated batch, on the device."""
        condition = {"class_labels": batch["label"].to(self.device, non_blocking=True)}
        if "mean" in batch:
            return draw_latent(batch, generator, self.device), condition
        mean, std = self._encode(batch["image"], generator)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        return mean + std * noise.to(self.device), condition

    def _encode(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pixels = images.to(self.device, non_blocking=True).float() / 127.5 - 1
        if self.random_flip:
            pixels = flip_half(pixels, generator)
        return scaled_posterior(self.vae, pixels)


def draw_latent(
    batch: dict[str, Tensor], generator: torch.Generator, device: torch.device
) -> Tensor:
    """A latent ``(B, c, h, w)`` of one view of cached ones ``(B, V, c, h, w)``.

    Without `std`, which a cache of drawn latents lacks, the mean is the latent.
    """
    rows, views = batch["mean"].shape[:2]
    chosen = torch.randint(views, (rows,), generator=generator, device=generator.device)
    home = batch["mean"].device
    index = torch.arange(rows, device=home), chosen.to(home)
    mean = batch["mean"][index].to(device, non_blocking=True)
    if "std" not in batch:
        return mean
    std = batch["std"][index].to(device, non_blocking=True)
    noise = torch.randn(mean.shape, generator=generator, device=generator.device)
    return mean + std * noise.to(device)


class PromptData:
    """A `PromptCache` and the way from one of its batches to x_0 and the prompts' embeddings.

    Args:
        cache: what was made for the model.
        device: where batches go.
        in_memory: the whole cache lies there.

    Attributes:
        dataset: the cache, as it is read in training.
    """

    def __init__(self, cache: PromptCache, device: torch.device, in_memory: bool = False):
        self.cache = cache
        self.dataset = InMemoryPrompts(cache, device) if in_memory else cache
        self.device = device

    def prepare(
        self, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Condition]:
        """x_0 (B, c, h, w) float32 and the embeddings of a collated batch, on the device."""
        condition = {
            name: batch[name].to(self.device, non_blocking=True)
            for name in EMBEDDINGS
            if name in batch
        }
        return draw_latent(batch, generator, self.device), condition
