"""Small images wholly on the device: decoded once, then cropped, flipped and erased by the batch.

For images of some ten pixels a side, worker processes that decode and augment one by one keep a GPU
waiting; a batch of them is one `grid_sample` there.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from .config import DataConfig
from .data import SeededImages, image_size, seed_everything

LOG_RATIO = math.log(4 / 3)


def random_crops(
    images: Tensor, scale: tuple[float, float], hflip: float, interpolation: str
) -> Tensor:
    """A random resized crop and flip of each image, of the size it had.

    The crop's share of the area is uniform in `scale`, its aspect ratio log-uniform in [3/4, 4/3]
    (Szegedy et al., arXiv:1409.4842, section 6), cut where it would leave the image.

    Args:
        images: ``(B, C, H, W)``, floating point.
        scale: range of the share of the area.
        hflip: probability of a horizontal flip.
        interpolation: `bilinear` or `bicubic`.

    Returns:
        ``(B, C, H, W)``.
    """
    count, device = len(images), images.device
    area = torch.empty(count, device=device).uniform_(*scale)
    root = torch.empty(count, device=device).uniform_(-LOG_RATIO, LOG_RATIO).mul(0.5).exp()
    width, height = (area.sqrt() * root).clamp(max=1), (area.sqrt() / root).clamp(max=1)
    # Centres in grid_sample's coordinates, where the image is [-1, 1].
    x, y = (torch.rand(2, count, device=device) * 2 - 1) * (1 - torch.stack([width, height]))
    sign = torch.where(torch.rand(count, device=device) < hflip, -1.0, 1.0)
    zero = torch.zeros_like(x)
    rows = torch.stack([width * sign, zero, x, zero, height, y], dim=-1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(
        images, grid, mode=interpolation, padding_mode="border", align_corners=False
    )


class DeviceBatches:
    """Batches of augmented training images from a dataset that lies on the device as uint8.

    What a batch holds depends on seed, epoch and its index alone. Each process takes every n-th
    image of the epoch's order; the last incomplete batch is left out.

    Args:
        images: a dataset of images in memory; each is decoded and resized once.
        config: batch size, crop, flip and erasing.
        model: its data configuration gives mean and deviation, and it the size.
        seed: of order and augmentation.
        device: where the images lie.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        images: Any,
        config: DataConfig,
        model: nn.Module,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.seed, self.rank, self.world_size = config, seed, rank, world_size
        cfg = resolve_model_data_config(model)
        size = image_size(model)
        images.transform = None
        pixels = []
        for index in range(len(images)):
            image = TF.pil_to_tensor(images[index][0])
            if image.shape[1:] != size:
                image = TF.resize(image, list(size), antialias=True)
            pixels.append(image)
        self.pixels = torch.stack(pixels).to(device)
        self.labels = torch.as_tensor(images.labels, device=device)
        self.mean, self.std = (
            torch.tensor(cfg[name], device=device).view(-1, 1, 1) * 255 for name in ("mean", "std")
        )
        self.erase = RandomErasing(config.reprob, mode="pixel", device=device)
        self.dataset = SeededImages(images, seed)

    def __len__(self) -> int:
        return len(self.labels) // self.world_size // self.config.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, batch = self.dataset.epoch, self.config.batch_size
        seed_everything(self.seed, epoch, 2)
        order = torch.randperm(len(self.labels))[self.rank :: self.world_size]
        order = order.to(self.labels.device)
        for index in range(len(self)):
            chosen = order[index * batch : (index + 1) * batch]
            seed_everything(self.seed, epoch, index, self.rank, 3)
            yield self._augmented(self.pixels[chosen]), self.labels[chosen]

    def _augmented(self, pixels: Tensor) -> Tensor:
        images = (pixels.float() - self.mean) / self.std
        if self.config.no_aug:
            return images
        config = self.config
        images = random_crops(images, config.scale, config.hflip, config.interpolation)
        return self.erase(images)
