"""Tensors of one layout that lie anywhere, as the table of addresses that a kernel reads."""

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from .._common.launch import aligned

# Tables that a CUDA graph may read whenever it is replayed, so that their memory is never free.
_IN_GRAPHS: list[Tensor] = []


class TensorTable:
    """Tensors of the same shape, dtype and device.

    Their addresses are kept, on their device too, since looking at every tensor and sending its
    address costs the host what the table is to spare. Who moves a tensor (`Module.to`, say) makes
    a new table: `is_current` tells.

    Args:
        name: of the tensors in an error.
        tensors: one or more.

    Raises:
        ValueError: none at all, shapes or devices disagree.
        TypeError: dtypes disagree.
    """

    def __init__(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        if not self.tensors:
            raise ValueError(f"`{name}` must hold at least one tensor, got none")
        first = self.tensors[0]
        self.shape, self.dtype, self.device = first.shape, first.dtype, first.device
        for x in self.tensors:
            if x.shape != self.shape or x.device != self.device:
                raise ValueError(
                    f"`{name}` must have one shape and device, got {tuple(self.shape)} on"
                    f" {self.device} and {tuple(x.shape)} on {x.device}"
                )
            if x.dtype != self.dtype:
                raise TypeError(f"`{name}` must have one dtype, got {self.dtype} and {x.dtype}")
        self._pointers = tuple(x.data_ptr() for x in self.tensors)
        # Rows one after the other, as a kernel takes them, on the boundaries that it counts on.
        self.is_plain = aligned(*self.tensors) and all(
            x.is_contiguous() and pointer and not x.is_neg()
            for x, pointer in zip(self.tensors, self._pointers, strict=True)
        )
        self._addresses: Tensor | None = None
        self._in_graph = False

    def __len__(self) -> int:
        return len(self.tensors)

    def is_current(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are the tensors of the table, where they were when it was made."""
        # In C as far as it goes: a model asks this of hundreds of weights before every pass.
        return (
            len(tensors) == len(self.tensors)
            and all(map(is_, tensors, self.tensors))
            and not self.has_moved()
            and all(x.dtype == self.dtype for x in self.tensors)
        )

    def has_moved(self) -> bool:
        """Whether some tensor lies elsewhere than when the table was made."""
        return tuple(map(Tensor.data_ptr, self.tensors)) != self._pointers

    def addresses(self) -> Tensor:
        """``(G,)``, int64, on the device of the tensors.

        Raises:
            RuntimeError: first asked for while a CUDA graph is captured, which cannot hold their
                sending.
        """
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._addresses is None:
            if capturing:
                raise RuntimeError(
                    "a `TensorTable` must be used once before a CUDA graph is captured with it"
                )
            self._addresses = torch.tensor(self._pointers, dtype=torch.int64, device=self.device)
        elif capturing and not self._in_graph:
            self._in_graph = True
            _IN_GRAPHS.append(self._addresses)
        return self._addresses
