"""The grouped MLP by PyTorch: runs on every device, differentiates, serves as the oracle."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common.precision import no_autocast


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A grouped 1x1 convolution of groups side by side: ``(G, B, D)`` to ``(G, B, D')``.

    One batched product; cuDNN takes a launch a group.
    """
    groups, _, width = x.shape
    by_group = weight.to(x.dtype).view(groups, -1, width).transpose(1, 2)
    return torch.baddbmm(bias.to(x.dtype).view(groups, 1, -1), x, by_group)


def grouped_mlp_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, groups: int
) -> Tensor:
    """The operation of `api.grouped_mlp`."""
    with no_autocast(x.device.type):
        by_group = x.unflatten(1, (groups, -1)).transpose(0, 1)  # (G, B, C / G)
        hidden = F.gelu(_grouped_linear(by_group, weight1, bias1))
        return _grouped_linear(hidden, weight2, bias2).transpose(0, 1).flatten(1)
