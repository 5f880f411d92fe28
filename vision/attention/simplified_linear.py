"""Simplified linear attention (SLA): ReLU features and a depthwise convolution of the values."""

from typing import Any, ClassVar

import torch
from timm.layers import resample_abs_pos_embed
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from .mixer import Grid, LinearMixer


@register_notrace_module
class SimplifiedLinearAttention(LinearMixer):
    """``o_i = relu(q_i) S / (relu(q_i) . z + 1e-6) + DWC(v)_i``.

    ``S = sum_j relu(k_j + E_j) v_j^T``, ``z = sum_j relu(k_j + E_j)``, E a learned table with a row
    a token. The convolution has D filters shared by all heads. Guo et al. 2024 (arXiv:2405.11582),
    section 3.2; table, eps and the sharing of filters are those of the released weights. State and
    denominator are float32 whatever the input.

    Args:
        dim: see `LinearMixer`, as all others.
        kernel_size: of the depthwise convolution, odd.

    Raises:
        ValueError: an even kernel, which would move its output by half a token.
    """

    attention: ClassVar[dict[str, Any] | None] = {
        "feature_map": "relu",
        "normalizer": "ratio",
        "eps": 1e-6,
    }

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: Grid,
        kernel_size: int = 5,
        sr_ratio: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, grid=grid, sr_ratio=sr_ratio, **kwargs, **dd)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd and positive, got {kernel_size}")
        head_dim = dim // num_heads
        self.dwc = nn.Conv2d(
            head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim, **dd
        )
        height, width = self.table_grid
        self.positional_encoding = nn.Parameter(torch.empty(1, height * width, dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.positional_encoding)

    @property
    def table_grid(self) -> Grid:
        """Grid of `positional_encoding`."""
        return self._reduced_grid(self.grid)

    def set_input_size(self, grid: Grid) -> None:
        table = self._positions(self._reduced_grid(grid))
        requires_grad = self.positional_encoding.requires_grad
        self.positional_encoding = nn.Parameter(table.detach(), requires_grad=requires_grad)
        super().set_input_size(grid)

    def _positions(self, grid: Grid) -> Tensor:
        usual = self.table_grid
        if tuple(grid) == usual:
            return self.positional_encoding
        return resample_abs_pos_embed(
            self.positional_encoding, new_size=list(grid), old_size=list(usual), num_prefix_tokens=0
        )

    def features(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        positions = self._positions(grid)
        if self.num_prefix_tokens:
            positions = F.pad(positions, (0, 0, self.num_prefix_tokens, 0))
        k = k + positions.view(*k.shape[1:])
        if k.dtype != q.dtype:
            k = k.to(q.dtype)  # a float32 table must not widen half keys
        return q, k

    def local_kernel(self, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dwc: Any = self.dwc
        weight, bias = dwc.weight.squeeze(1), dwc.bias
        if self.lepe is not None:
            # Both convolve v: one pass with the sum of the kernels, the smaller one padded.
            border = (weight.shape[-1] - 3) // 2
            lepe = F.pad(self.lepe.weight.squeeze(1), [max(border, 0)] * 4)
            weight = F.pad(weight, [max(-border, 0)] * 4).repeat(self.num_heads, 1, 1) + lepe
            bias = bias.repeat(self.num_heads) + self.lepe.get_parameter("bias")
        return weight, bias
