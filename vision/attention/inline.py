"""InLine attention: injective linear attention with a local term made from the mean token."""

from typing import Any, ClassVar

import torch
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from lintra.kernels import FilterMlp

from .mixer import Grid, LinearMixer

KERNEL_FUNCTIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leakyrelu": lambda x: F.leaky_relu(x, 0.01),
    "exp": lambda x: torch.exp(0.2 * x),
}


@register_notrace_module
class InLineAttention(LinearMixer):
    """``o_i = s phi(q_i) Cov(phi(k), v) + mean(v) + (r * v)_i``, s = D^-1/2, no denominator.

    The rows of the implied attention matrix sum to one and may be negative. ``r`` is a 3x3
    depthwise kernel for each sample and channel, made from the mean of the input tokens by two
    grouped linear maps with a GELU between; prefix tokens get none. Han et al. 2024, Bridging the
    Divide (arXiv:2412.06590), Eq. 5 and 9.

    Args:
        dim: see `LinearMixer`, as all others.
        kernel_func: phi: ``identity`` (all released models), ``relu``, ``leakyrelu`` or ``exp``
            (exp(0.2 x)).
        raw_context: the kernel is made from the block's un-normed input, which the block passes
            as `context` (CSwin).

    Raises:
        ValueError: an unknown kernel function, or sr_ratio above 1: the local term needs a value
            for each token.
    """

    attention: ClassVar[dict[str, Any] | None] = {
        "feature_map": "identity",
        "normalizer": "covariance",
    }
    reads_mean = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: Grid,
        kernel_func: str = "identity",
        raw_context: bool = False,
        sr_ratio: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if sr_ratio != 1:
            raise ValueError(f"`sr_ratio` must be 1 for InLine attention, got {sr_ratio}")
        if kernel_func not in KERNEL_FUNCTIONS:
            names = ", ".join(KERNEL_FUNCTIONS)
            raise ValueError(f"`kernel_func` must be one of {names}, got {kernel_func!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, grid=grid, **kwargs, **dd)
        self.kernel_func = kernel_func
        self.reads_context = raw_context
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
        )

    def input_layers(self) -> list[nn.Module]:
        # The mean of normed tokens is the norm's affine map of the mean: it folds here as well.
        dynamic = [] if self.reads_context else [self.residual[0]]
        return super().input_layers() + dynamic

    def features(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        phi = KERNEL_FUNCTIONS[self.kernel_func]
        return phi(q), phi(k)

    def local_kernel(self, mean: Tensor | None) -> tuple[Tensor | FilterMlp, Tensor | None]:
        assert mean is not None
        layers: Any = self.residual
        first, _, second = layers
        # (9 C): channels of a head one after the other, each with its nine weights.
        bias = second.bias if self.lepe is None else second.bias + self.lepe.weight.flatten()
        weights = (first.weight, first.bias, second.weight, bias)
        mlp = FilterMlp(mean, *weights, groups=self.num_heads, size=3)
        return mlp, None if self.lepe is None else self.lepe.bias
