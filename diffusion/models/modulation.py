"""Normalisation with a scale and a shift a sample, as the blocks of DiT and FLUX call it."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from lintra.kernels import ada_layer_norm, gated_ada_layer_norm


def _is_plain(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether `norm` is what the operations compute: a LayerNorm without weights."""
    return type(norm) is nn.LayerNorm and norm.weight is None


def modulated(norm: nn.Module, tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``norm(tokens) * (1 + scale) + shift`` with scale and shift ``(B, C)``.

    A LayerNorm without weights is not called but computed, in one pass with the rest.
    Any other module is called.
    """
    if _is_plain(norm):
        return ada_layer_norm(tokens, scale, shift, eps=norm.eps)
    return torch.addcmul(shift.unsqueeze(1), norm(tokens), 1 + scale.unsqueeze(1))


def gated_modulated(
    norm: nn.Module, tokens: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """``h = tokens + gate * update`` and `modulated` h, with gate, scale and shift ``(B, C)``."""
    if _is_plain(norm):
        return gated_ada_layer_norm(tokens, update, gate, scale, shift, eps=norm.eps)
    tokens = torch.addcmul(tokens, gate.unsqueeze(1), update)
    return tokens, modulated(norm, tokens, scale, shift)
