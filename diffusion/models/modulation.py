"""Norms with a scale and a shift a sample, and gated sums, as blocks of DiT and FLUX call them."""

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from lintra.kernels import ada_layer_norm, gated_ada_layer_norm, gated_add
from lintra.kernels.ada_layer_norm import configs

from ..untouched import is_unhooked


class GatedSum(NamedTuple):
    """``tokens + gate * update``, ``(B, N, C)`` with gate ``(B, C)``, which nobody has added yet: a
    norm that follows does so in its own pass, see `gated_modulated`."""

    tokens: Tensor
    update: Tensor
    gate: Tensor


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
    tokens = gated(tokens, update, gate)
    return tokens, modulated(norm, tokens, scale, shift)


def gated(tokens: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """``tokens + gate * update`` with gate ``(B, C)``, or ``(1, C)``; the widest dtype wins."""
    if (
        not torch.compiler.is_compiling()  # a size would be guarded
        # Spares the host what follows, unless a backward pass has three calls fewer then.
        and (
            tokens.numel() >= configs.GATED_ADD_MIN_ELEMENTS
            or (torch.is_grad_enabled() and update.requires_grad)
        )
        and tokens.dtype == update.dtype == gate.dtype
        and tokens.shape == update.shape
        and tokens.shape[0] == gate.shape[0]
    ):
        return gated_add(tokens, update, gate)
    return torch.addcmul(tokens, gate.unsqueeze(1), update)
