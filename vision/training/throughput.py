"""How many images a second a model takes in evaluation."""

import time

import torch
from torch import nn


@torch.no_grad()
def images_per_second(
    model: nn.Module,
    size: tuple[int, int, int],
    *,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
    seconds: float = 2.0,
) -> float:
    """Images a second of the forward pass, on random images on the model's device.

    Args:
        model: put into evaluation mode.
        size: ``(channels, height, width)``.
        batch_size: images at a time.
        dtype: autocast to it; None for the model's own.
        seconds: measured time, after as much warm-up as three batches.
    """
    model.eval()
    device = next(model.parameters()).device
    images = torch.randn(batch_size, *size, device=device)

    def run(count: int) -> float:
        started = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            for _ in range(count):
                model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    run(3)
    count = max(1, round(seconds / run(1)))
    return count * batch_size / run(count)
