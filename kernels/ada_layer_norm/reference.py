"""Adaptive layer normalisation by PyTorch: runs on every device, differentiates, is the oracle."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common.operators import needs_gradient
from .._common.precision import accumulation_dtype, no_autocast


def ada_layer_norm_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The operation of `api.ada_layer_norm`."""
    dtype = accumulation_dtype(x.dtype)
    with no_autocast(x.device.type):
        normed = F.layer_norm(x.to(dtype), (x.shape[-1],), eps=eps)
        scale, shift = scale.unsqueeze(1).to(dtype), shift.unsqueeze(1).to(dtype)
        return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gated_ada_layer_norm_reference(
    x: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The operation of `api.gated_ada_layer_norm`."""
    h = gated_add_reference(x, update, gate)
    return h, ada_layer_norm_reference(h, scale, shift, eps)


def gated_add_reference(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """The operation of `api.gated_add`."""
    keeps_sum = not torch.compiler.is_compiling() or not needs_gradient(x, update, gate)
    gate = gate.unsqueeze(1)
    with no_autocast(x.device.type):
        if x.dtype == update.dtype == gate.dtype:
            if keeps_sum:
                return torch.addcmul(x, gate, update)  # float32 inside
            # One kernel, float32 inside, too; but this the partitioner of a graph computes once
            # more for the backward pass, where it keeps what `addcmul` gives: a tensor a block.
            return x + gate * update
        dtype = accumulation_dtype(x.dtype)
        return torch.addcmul(x.to(dtype), gate.to(dtype), update.to(dtype)).to(x.dtype)
