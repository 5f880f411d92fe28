"""The device: opening it, waiting for it, what it remembers, and what it says when it fails."""

import contextlib
import gc

import torch


def open_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: this machine has none.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` must be one of this machine, got {name!r}") from error


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 0


def freeze() -> None:
    """Spares `release` the objects of imported modules: half a million, a third of a second."""
    gc.collect()
    gc.freeze()


def release(device: torch.device) -> None:
    """Gives the memory of what has been dropped back."""
    if device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # an error of the last case may surface here
            synchronize(device)
        torch.cuda.empty_cache()


class Peak:
    """The most bytes allocated since it was made, beyond those of that moment; 0 on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        if device.type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def bytes(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.max_memory_allocated(self._device) - self._before


OUT_OF_MEMORY = "out of memory"


def short(error: BaseException) -> str:
    """One line about an error for a cell of a table."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:120].replace("|", "/")
