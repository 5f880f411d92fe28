"""Every image of a source decoded once, as one tensor where training reads it."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .images import ImageSource


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
