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
        products = [F.linear(y, weight.to(y.dtype), bias.to(y.dtype)) for y, weight, bias in layers]
        out = torch.stack(products)
        if rows is not None and labels is not None:
            each = labels.unbind() if labels.ndim == 2 else (labels,) * len(rows)
            out = out + torch.stack(list(map(F.embedding, each, rows)))
        return F.silu(out) if silu else out
