"""Stacked linear layers by PyTorch: runs on every device, differentiates, serves as the oracle."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common.precision import no_autocast


def stacked_linear_reference(
    x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...],
    rows: tuple[Tensor, ...] | None, labels: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """The operation of `api.stacked_linear`."""
    inputs = x.unbind() if x.ndim == 3 else (x,) * len(weights)
    with no_autocast(x.device.type):
        layers = zip(inputs, weights, biases, strict=True)
        out = torch.stack([F.linear(y, weight, bias) for y, weight, bias in layers])
        if rows is not None and labels is not None:
            out = out + torch.stack([F.embedding(labels, table) for table in rows])
        return F.silu(out) if silu else out
