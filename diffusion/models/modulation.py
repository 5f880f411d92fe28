"""Normalisation with a scale and a shift a sample, as the blocks of DiT and FLUX call it."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from lintra.kernels import ada_layer_norm, gated_ada_layer_norm

from ..untouched import is_unhooked


def _is_plain(norm: nn.Module, tokens: Tensor, scale: Tensor) -> TypeGuard[nn.LayerNorm]:
    """Whether the operations compute this: a LayerNorm without weights, a scale for each sample."""
    return (
        type(norm) is nn.LayerNorm
        and norm.weight is None
        and len(norm.normalized_shape) == 1
        and is_unhooked(norm)
        and scale.shape[0] == tokens.shape[0]
    )


def modulated(norm: nn.Module, tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``norm(tokens) * (1 + scale) + shift`` with scale and shift ``(B, C)``, or ``(1, C)``.

    A LayerNorm without weights or hooks is not called but computed, in one pass with the rest.
    Any other module is called.
    """
    if _is_plain(norm, tokens, scale):
        return ada_layer_norm(tokens, scale, shift, eps=norm.eps)
    return torch.addcmul(shift.unsqueeze(1), norm(tokens), 1 + scale.unsqueeze(1))


def gated_modulated(
    norm: nn.Module, tokens: Tensor, update: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """``h = tokens + gate * update`` and `modulated` h; gate, scale and shift as there."""
    if _is_plain(norm, tokens, scale):
        return gated_ada_layer_norm(tokens, update, gate, scale, shift, eps=norm.eps)
    tokens = torch.addcmul(tokens, gate.unsqueeze(1), update)
    return tokens, modulated(norm, tokens, scale, shift)
