"""Batches that depend on seed and step alone, so that a resumed run sees the same ones."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from .images import ImageSource
from .latent_cache import LatentCache
from .memory import InMemoryImages, InMemoryPrompts
from .prompt_cache import PromptCache


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

    def _order(self, epoch: int) -> list[int]:
        generator = step_generator(self.seed, epoch, -1)
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, list[int]()
        step = self.start
        while True:
            first = (step * self.num_processes + self.rank) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = self._order(epoch)
                batch.append(order[position % self.length])
            yield batch
            step += 1


class BucketSampler(Sampler[list[int]]):
    """Endless batches of one bucket each, from micro-step `start` on.

    An epoch shuffles every bucket and cuts it into global batches, of which all processes take
    their slice; the last of a bucket is filled up from the bucket's beginning. Then the batches
    are shuffled. An item comes once an epoch, but for those that fill up.

    Args:
        bucket_of: number of the bucket of each item, ``(N,)``.
        batch_size: items a process and batch.
        seed, start, rank, num_processes: as of `StepSampler`.
    """

    def __init__(
        self,
        bucket_of: Tensor,
        batch_size: int,
        *,
        seed: int,
        start: int,
        rank: int,
        num_processes: int,
    ):
        numbers = bucket_of.unique().tolist()
        self.buckets = [(bucket_of == number).nonzero().flatten() for number in numbers]
        self.batch_size = batch_size
        self.global_size = batch_size * num_processes
        self.seed = seed
        self.start = start
        self.rank = rank
        self.batches_per_epoch = sum(-(-len(rows) // self.global_size) for rows in self.buckets)

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Global batches of one epoch, in order."""
        generator = step_generator(self.seed, epoch, -1)
        batches: list[list[int]] = []
        for rows in self.buckets:
            order = rows[torch.randperm(len(rows), generator=generator)].tolist()
            count = -(-len(order) // self.global_size)
            filled = [order[i % len(order)] for i in range(count * self.global_size)]
            batches += [
                filled[i : i + self.global_size] for i in range(0, len(filled), self.global_size)
            ]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[int]]:
        epoch, batches = -1, []
        step, first = self.start, self.rank * self.batch_size
        while True:
            if step // self.batches_per_epoch != epoch:
                epoch = step // self.batches_per_epoch
                batches = self._epoch(epoch)
            batch = batches[step % self.batches_per_epoch]
            yield batch[first : first + self.batch_size]
            step += 1


def make_loader(
    dataset: ImageSource | LatentCache | InMemoryImages | PromptCache | InMemoryPrompts,
    batch_size: int,
    *,
    seed: int,
    start: int,
    rank: int,
    num_processes: int,
    num_workers: int,
) -> Iterable[dict[str, Any]]:
    """Loader of the batches from micro-step `start` on; those of a prompt cache have one size."""
    place = {"seed": seed, "start": start, "rank": rank, "num_processes": num_processes}
    sampler: Sampler[list[int]]
    if isinstance(dataset, PromptCache | InMemoryPrompts):
        sampler = BucketSampler(dataset.bucket_of, batch_size, **place)
    else:
        sampler = StepSampler(len(dataset), batch_size, **place)
    if isinstance(dataset, InMemoryImages | InMemoryPrompts):
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
