"""RepBN and PRepBN: batch norms that replace LayerNorm during training and fold away afterwards.

Guo et al. 2024, SLAB (arXiv:2405.11582), section 3.1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from timm.layers import LayerNorm
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from lintra.kernels import layer_norm

NORMS = ("ln", "prepbn", "repbn")
NormFactory = Callable[..., nn.Module]


def _is_recomputing() -> bool:
    """Whether this forward belongs to a backward pass: activation checkpointing runs it again."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


@contextmanager
def _fixed_statistics(bn: nn.modules.batchnorm._BatchNorm) -> Iterator[None]:
    """Context in which `bn` normalises with the batch's statistics but keeps its running ones."""
    momentum, count = bn.momentum, bn.num_batches_tracked
    bn.momentum, bn.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        bn.momentum, bn.num_batches_tracked = momentum, count


class ChannelAffine(nn.Module):
    """``y = scale * x + shift`` over the last dimension: what remains of a RepBN that stands alone.

    Args:
        scale: ``(C)``.
        shift: ``(C)``.
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale)
        self.bias = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight + self.bias).to(x.dtype)


@register_notrace_module
class RepBN(nn.Module):
    """``BN(x) + alpha * x``: a batch norm with a skip, an affine map once training is over.

    ``BN(x) = weight * (x - mean) / sqrt(var + eps) + bias`` with statistics over all dimensions but
    the last, a class token included. Guo et al. 2024 (arXiv:2405.11582), Eq. 4-5.

    Running statistics move once a forward in training mode; a forward that activation
    checkpointing repeats leaves them alone.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics.

    Shape:
        ``(..., C)`` to the same shape and dtype: ``(B, C)``, ``(B, N, C)``, ``(B, H, W, C)``.

    Raises:
        ValueError: the last dimension is not C, or a single token to take statistics of.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        # A torch batch norm, so that SyncBatchNorm conversion and norm freezing find it.
        self.bn = nn.BatchNorm1d(num_features, eps=eps, momentum=momentum).to(device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.alpha)

    @property
    def weight(self) -> Tensor:
        """The batch norm's gain: timm reads device and dtype of a norm from its weight."""
        return self.bn.weight

    def affine(self) -> tuple[Tensor, Tensor]:
        """``(scale, shift)`` of the map in evaluation, each ``(C)`` in float32 or float64."""
        bn = self.bn
        dtype = torch.promote_types(torch.float32, bn.weight.dtype)
        mean, variance = bn.get_buffer("running_mean"), bn.get_buffer("running_var")
        gain = bn.weight.to(dtype) * torch.rsqrt(variance.to(dtype) + bn.eps)
        shift = bn.bias.to(dtype) - gain * mean.to(dtype)
        return gain + self.alpha.to(dtype), shift

    def fuse(self) -> ChannelAffine:
        """The affine map of evaluation as a module; timm's `reparameterize_model` calls this."""
        scale, shift = self.affine()
        dtype = self.bn.weight.dtype
        return ChannelAffine(scale.detach().to(dtype), shift.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.num_features:
            raise ValueError(
                f"`x` must have {self.num_features} channels in its last dimension,"
                f" got shape {x.shape}"
            )
        if not self.bn.training:
            scale, shift = self.affine()
            return (x * scale + shift).to(x.dtype)
        if x.numel() == self.num_features:
            raise ValueError(
                f"`x` must hold more than one token to train a batch norm on, got shape {x.shape}"
            )
        return (self._normalize(x) + self.alpha * x).to(x.dtype)

    def _normalize(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.num_features)
        if _is_recomputing():
            with _fixed_statistics(self.bn):
                return self.bn(tokens).reshape(x.shape)
        return self.bn(tokens).reshape(x.shape)


@register_notrace_module
class PRepBN(nn.Module):
    """``mix * LN(x) + (1 - mix) * RepBN(x)`` in training, ``RepBN(x)`` in evaluation.

    Progressive RepBN: training starts as LayerNorm and ends as RepBN. `mix` is a float32 buffer
    that `PRepBNSchedule` sets from outside; it is not part of the state dict. Once it is zero the
    LayerNorm is not computed any more. Guo et al. 2024 (arXiv:2405.11582), Eq. 3.

    While mix is far from zero, accuracy in evaluation mode is that of RepBN alone and says little.

    Args:
        num_features: channels C.
        eps: of the LayerNorm.
        bn_eps: of the batch norm.
        momentum: of the batch norm.

    Shape:
        ``(..., C)`` to the same shape and dtype.

    Raises:
        ValueError: as RepBN.
    """

    mix: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        bn_eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(num_features, eps=eps, device=device, dtype=dtype)
        self.repbn = RepBN(num_features, bn_eps, momentum, device=device, dtype=dtype)
        mix = torch.ones((), device=device, dtype=torch.float32)
        self.register_buffer("mix", mix, persistent=False)
        # Python values, so that no step waits for the device to learn which parts it needs.
        self.use_ln = True
        self.use_repbn = True

    def init_non_persistent_buffers(self) -> None:
        """timm's hook after `to_empty`: back to the start of the schedule."""
        self.set_mix(1.0)

    def set_mix(self, value: float, *, use_repbn: bool = True) -> None:
        """Sets the share of LayerNorm in training.

        Args:
            value: in [0, 1]; at 0 LayerNorm is not computed.
            use_repbn: False leaves RepBN and its statistics out altogether (warm-up).
        """
        if not 0 <= value <= 1:
            raise ValueError(f"`value` must be in [0, 1], got {value}")
        self.mix.fill_(value)
        self.use_ln = value > 0 or not use_repbn
        self.use_repbn = use_repbn

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PRepBN":
        mix = self.mix
        super()._apply(fn, recurse)
        # `model.half()` must not round the schedule; on meta there is no value to keep.
        source = self.mix if mix.is_meta else mix
        self.mix = source.to(device=self.mix.device, dtype=torch.float32)
        return self

    @property
    def weight(self) -> Tensor:
        return self.repbn.weight

    def affine(self) -> tuple[Tensor, Tensor]:
        """``(scale, shift)`` of the map in evaluation, see `RepBN.affine`."""
        return self.repbn.affine()

    def fuse(self) -> ChannelAffine:
        """See `RepBN.fuse`."""
        return self.repbn.fuse()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.repbn(x)
        # The part that is left out still takes part with zero gradients: distributed training
        # waits for a gradient of every parameter.
        if not self.use_ln:
            unused = self.ln.weight.sum() + self.ln.bias.sum()
            return (self.repbn(x) + 0.0 * unused).to(x.dtype)
        normed = self.ln(x)
        if not self.use_repbn:
            bn = self.repbn.bn
            unused = bn.weight.sum() + bn.bias.sum() + self.repbn.alpha.sum()
            return (normed + 0.0 * unused).to(x.dtype)
        return (self.mix * normed + (1 - self.mix) * self.repbn(x)).to(x.dtype)


def _is_autocast(x: Tensor) -> bool:
    if x.is_cuda:
        return torch.is_autocast_enabled()  # of CUDA, in a tenth of the time that a name takes
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # meta has no autocast


@register_notrace_module
class TokenLayerNorm(LayerNorm):
    """timm's LayerNorm by `lintra.kernels.layer_norm`, whose kernel is for narrow tokens.

    Under autocast it stays timm's, which gives float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _is_autocast(x):
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


def norm_factory(name: str, eps: float) -> NormFactory:
    """The constructor ``factory(dim, device=, dtype=)`` of a norm.

    Args:
        name: ``ln``, ``prepbn`` (LayerNorm fading into RepBN) or ``repbn``.
        eps: of the LayerNorm; batch norms have 1e-5.
    """
    if name not in NORMS:
        raise ValueError(f"`norm` must be one of {', '.join(NORMS)}, got {name!r}")
    if name == "repbn":
        return partial(RepBN)
    return partial({"ln": TokenLayerNorm, "prepbn": PRepBN}[name], eps=eps)
