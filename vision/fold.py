"""Exact removal of RepBN and PRepBN: after training each is an affine map per channel.

Guo et al. 2024 (arXiv:2405.11582), section 3.1, folds into the following linear layer; here also
into the layer before, and into convolutions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .norm import ChannelAffine, PRepBN, RepBN

FOLDABLE_NORMS = (RepBN, PRepBN)
Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d


def _set_bias(layer: Layer, bias: Tensor) -> None:
    weight = layer.weight
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)


def _bias(layer: Layer) -> Tensor:
    weight = layer.weight
    if layer.bias is not None:
        return layer.bias.double()
    return torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)


@torch.no_grad()
def fold_into_reader(scale: Tensor, shift: Tensor, layer: nn.Module) -> None:
    """``layer(scale * x + shift)`` becomes ``layer(x)``: ``W' = W diag(scale)``, ``c' = c + W b``.

    Args:
        scale: ``(C)``.
        shift: ``(C)``, the b of the formula.
        layer: Linear or convolution (grouped, strided, dilated) with C input channels that does
            not pad; gains a bias if it has none.

    Raises:
        ValueError: another kind of layer, or a convolution that pads: zeros beside the image would
            have to become -shift / scale.
    """
    layer = _checked(layer)
    if any(getattr(layer, "padding", (0,))):
        raise ValueError(
            f"`layer` must not pad to take in the norm before it, got padding {layer.padding}"
        )
    weight = layer.weight.double()
    groups = getattr(layer, "groups", 1)
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    by_input = (groups, 1, weight.shape[1], 1)
    moved = (grouped * shift.double().view(by_input)).sum((2, 3)).flatten()
    _set_bias(layer, _bias(layer) + moved)
    layer.weight.copy_((grouped * scale.double().view(by_input)).view_as(weight))


@torch.no_grad()
def fold_into_writer(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """``scale * layer(x) + shift`` becomes ``layer(x)``: ``W' = diag(scale) W``, ``c' = a c + b``.

    Args:
        layer: Linear or convolution with C output channels; gains a bias if it has none.
        scale: ``(C)``, the a of the formula.
        shift: ``(C)``, the b of the formula.

    Raises:
        ValueError: another kind of layer.
    """
    layer = _checked(layer)
    weight = layer.weight.double()
    _set_bias(layer, _bias(layer) * scale.double() + shift.double())
    layer.weight.copy_(weight * scale.double().view(-1, *[1] * (weight.ndim - 1)))


def _checked(layer: nn.Module) -> Layer:
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        raise ValueError(
            f"`layer` must be a Linear or a convolution for a norm to fold into it,"
            f" got {type(layer).__name__}"
        )
    return layer


@dataclass(frozen=True)
class NormSite:
    """A norm and the layers that it folds into: all that read it, or the one that writes to it.

    Args:
        owner: module that holds the norm.
        name: its attribute there.
        readers: layers that read the norm's output, and nothing else does.
        writer: layer whose output only the norm reads.
    """

    owner: nn.Module
    name: str
    readers: Sequence[nn.Module] = ()
    writer: nn.Module | None = None

    @property
    def norm(self) -> Any:
        return getattr(self.owner, self.name)

    def fold(self) -> None:
        """Folds the norm and leaves an Identity; does nothing where the norm is another one."""
        if not isinstance(self.norm, FOLDABLE_NORMS):
            return
        scale, shift = self.norm.affine()
        if self.writer is not None:
            fold_into_writer(self.writer, scale, shift)
        for layer in self.readers:
            fold_into_reader(scale, shift, layer)
        setattr(self.owner, self.name, nn.Identity())


class Foldable:
    """Mixin of modules that hold a norm beside the layers it folds into.

    `reparameterize` is also what timm's `reparameterize_model` calls.
    """

    def norm_sites(self) -> list[NormSite]:
        raise NotImplementedError

    def reparameterize(self) -> None:
        """Folds the norms of this module; those of its children fold by themselves."""
        for site in self.norm_sites():
            site.fold()


def fold_norms(model: nn.Module) -> nn.Module:
    """Removes every RepBN and PRepBN exactly, for deployment.

    With ``a = weight / sqrt(var + eps) + alpha`` and ``b = bias - weight * mean / sqrt(var + eps)``
    a norm in evaluation is ``a x + b``. It goes into all layers that read it, or into the layer
    that writes to it. The final norm of a backbone goes into the classifier; pre-logits features
    stay what they were. Computed in float64.

    The model then is for evaluation: its running statistics are used up. `a` may be negative or
    zero; nothing divides by it.

    Args:
        model: a backbone of lintra, or any module that holds some; changed in place.

    Returns:
        The model.

    Raises:
        ValueError: a norm with nothing to fold into. The model is unchanged then. timm's
            ``reparameterize_model`` keeps such a norm as an affine map.
    """
    owners = [module for module in model.modules() if isinstance(module, Foldable)]
    covered = {id(site.norm) for module in owners for site in module.norm_sites()}
    # The RepBN inside a PRepBN goes with it.
    covered |= {id(module.repbn) for module in model.modules() if isinstance(module, PRepBN)}
    left = [
        name
        for name, module in model.named_modules()
        if isinstance(module, FOLDABLE_NORMS) and id(module) not in covered
    ]
    if left:
        raise ValueError(
            "`model` must have a Linear or a convolution beside each norm to fold it exactly,"
            f" got norms that stand alone: {', '.join(left)}"
        )
    for module in owners:
        module.reparameterize()
    return model


def affine_module(norm: nn.Module) -> nn.Module:
    """`norm` as a ChannelAffine if it is a RepBN or PRepBN, else itself."""
    return norm.fuse() if isinstance(norm, FOLDABLE_NORMS) else norm


__all__ = [
    "ChannelAffine",
    "Foldable",
    "NormSite",
    "affine_module",
    "fold_into_reader",
    "fold_into_writer",
    "fold_norms",
]
