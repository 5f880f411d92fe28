"""Normalisation and rotation by PyTorch: runs on every device, differentiates, is the oracle."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common.precision import accumulation_dtype, no_autocast


def rotary_rms_norm_reference(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor,
    cosines: Tensor, sines: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of `api.rotary_rms_norm`."""
    dtype = accumulation_dtype(query.dtype)
    cosines, sines = (table.to(dtype).unsqueeze(1) for table in (cosines, sines))  # (N, 1, D)
    results = []
    with no_autocast(query.device.type):
        for tokens, weight in ((query, query_weight), (key, key_weight)):
            normed = F.rms_norm(tokens.to(dtype), weight.shape, weight.to(dtype), eps)
            even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((-odd, even), dim=-1).flatten(-2)
            results.append((normed * cosines + turned * sines).to(tokens.dtype))
    return results[0], results[1]
