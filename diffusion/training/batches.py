"""Batches that depend on seed and step alone, so that a resumed run sees the same ones."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from .images import ImageSource
from .latent_cache import LatentCache
from .memory import InMemoryImages


def step_generator(
    seed: int, step: int, rank: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Generator of all random draws of one micro-step on one process."""
    generator = torch.Generator(device)
    # Distinct for every (seed, step, rank): Python's hash of a tuple of ints is deterministic.
    return generator.manual_seed(hash((seed, step, rank)) & (2**63 - 1))


class StepSampler(Sampler[list[int]]):
    """Endless batches of indices, from micro-step `start` on.

    All processes walk through one shuffled order of the data set, a new one each epoch; process
    `rank` takes its slice of every global batch. Nothing is dropped at the end of an epoch.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, start: int, rank: int, num_processes: int
    ):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.num_processes = num_processes

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(self.length, generator=step_generator(self.seed, epoch, -1))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        step = self.start
        while True:
            first = (step * self.num_processes + self.rank) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = self._order(epoch)
                batch.append(int(order[position % self.length]))
            yield batch
            step += 1


def make_loader(
    dataset: ImageSource | LatentCache | InMemoryImages,
    batch_size: int,
    *,
    seed: int,
    start: int,
    rank: int,
    num_processes: int,
    num_workers: int,
) -> Iterable[dict[str, Any]]:
    """Loader of the batches from micro-step `start` on."""
    sampler = StepSampler(
        len(dataset),
        batch_size,
        seed=seed,
        start=start,
        rank=rank,
        num_processes=num_processes,
    )
    if isinstance(dataset, InMemoryImages):
        return dataset.batches(sampler)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def flip_half(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each image (B, C, H, W) with probability one half."""
    flip = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1).to(images.device), images.flip(-1), images)
