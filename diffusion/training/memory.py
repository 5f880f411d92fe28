"""Data sets that lie whole where training reads them: decoded images, and prompt caches."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .images import ImageSource
from .prompt_cache import PromptCache


class InMemoryImages(Dataset):
    """The images of `source` as one uint8 tensor on `device`; items and order are the source's.

    64 x 64 RGB takes 12 KiB an image. Decoding runs in threads: Pillow leaves the interpreter's
    lock while it works.

    Args:
        source: the opened images.
        device: where the tensor lies.
    """

    def __init__(self, source: ImageSource, device: torch.device | str = "cpu"):
        with ThreadPoolExecutor() as pool:
            decoded = list(pool.map(lambda index: source[index]["image"], range(len(source))))
        self.images = torch.stack(decoded).to(device)
        self.labels = source.labels.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}

    def batches(self, sampler: Iterable[list[int]]) -> Iterator[dict[str, Tensor]]:
        """Collated batches of the sampler's indices, gathered on the device."""
        for rows in sampler:
            index = torch.tensor(rows, device=self.images.device)
            yield {"image": self.images[index], "label": self.labels[index]}


class InMemoryPrompts(Dataset):
    """The rows of a prompt cache as tensors on `device`, a set of them for each bucket.

    Items and order are the cache's. 64 x 64 RGB pixels take 48 KiB an image and view.

    Args:
        cache: the opened cache.
        device: where the tensors lie.
    """

    def __init__(self, cache: PromptCache, device: torch.device | str = "cpu"):
        self.bucket_of = cache.bucket_of
        self._tensors: dict[int, dict[str, Tensor]] = {}
        self._row = torch.empty_like(self.bucket_of)
        for bucket in self.bucket_of.unique().tolist():
            items = (self.bucket_of == bucket).nonzero().flatten()
            self._row[items] = torch.arange(len(items))
            self._tensors[bucket] = cache.read_bucket(bucket, device)

    def __len__(self) -> int:
        return len(self.bucket_of)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._row[index]
        return {k: v[row] for k, v in self._tensors[int(self.bucket_of[index])].items()}

    def batches(self, sampler: Iterable[list[int]]) -> Iterator[dict[str, Tensor]]:
        """Collated batches of the sampler's indices, all of one bucket, gathered on the device."""
        for items in sampler:
            tensors = self._tensors[int(self.bucket_of[items[0]])]
            index = self._row[items].to(tensors["mean"].device, non_blocking=True)
            yield {name: value[index] for name, value in tensors.items()}
