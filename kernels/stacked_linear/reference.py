"""Stacked linear layers by PyTorch: runs on every device, differentiates, serves as the oracle."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common.precision import no_autocast


def stacked_linear_reference(
    x: Tensor | tuple[Tensor, ...], weights: tuple[Tensor, ...], biases: tuple[Tensor, ...],
    rows: tuple[Tensor, ...] | None, labels: Tensor | None, silu: bool, product: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operation of `api.stacked_linear`, layer by layer."""
    count = len(weights)
    inputs = x if isinstance(x, tuple) else x.unbind() if x.ndim == 3 else (x,) * count
    outs = []
    with no_autocast(inputs[0].device.type):
        for layer in range(count):
            tensors = (inputs[layer], weights[layer], biases[layer])
            out = F.linear(*(tensor.to(product) for tensor in tensors))
            if rows is not None and labels is not None:
                label = labels if labels.ndim == 1 else labels[layer]
                out = out + F.embedding(label, rows[layer])
            outs.append(F.silu(out) if silu else out)
    return tuple(outs)
