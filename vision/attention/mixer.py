"""What the linear token mixers share: projections, spatial reduction, local term, class tokens."""

from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from lintra.kernels import FilterMlp, linear_attention, linear_attention_conv2d, token_conv2d

from ..fold import Foldable, NormSite
from ..norm import NormFactory

Grid = tuple[int, int]


class LinearMixer(Foldable, nn.Module):
    """``proj(attend(q, k, v) + depthwise convolution of v)``; a subclass says how to attend.

    Tokens lie row-major on `grid`, after `num_prefix_tokens` others (a class token), which take
    part in the attention but have no local term. Windows are samples of the batch.

    Args:
        dim: channels C.
        num_heads: heads H; head_dim D = C / H.
        grid: ``(h, w)``, the usual grid; `forward` takes any other.
        qkv_bias: the projections have a bias.
        fused_qkv: one Linear `qkv`, else `q` and `kv`.
        num_prefix_tokens: leading tokens off the grid.
        sr_ratio: keys and values come from a strided convolution over sr x sr tokens (PVT).
        lepe: adds a 3x3 depthwise convolution of v, with bias (CSwin's position encoding).
        proj_drop: dropout of the output.
        norm_layer: norm after the strided convolution.

    Raises:
        ValueError: channels that the heads do not divide.
    """

    attention: ClassVar[dict[str, Any] | None] = None
    """Options of `linear_attention`; None where `attend` is another attention."""

    reads_mean = False
    """Whether the local kernel is made from the mean token."""

    reads_context = False
    """Whether the block passes its un-normed input as `context`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: Grid,
        qkv_bias: bool = True,
        fused_qkv: bool = True,
        num_prefix_tokens: int = 0,
        sr_ratio: int = 1,
        lepe: bool = False,
        proj_drop: float = 0.0,
        norm_layer: NormFactory | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"`dim` must be a multiple of num_heads {num_heads}, got {dim}")
        self.dim = dim
        self.num_heads = num_heads
        self.grid: Grid = (grid[0], grid[1])
        self.num_prefix_tokens = num_prefix_tokens
        self.sr_ratio = sr_ratio
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        else:
            self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **dd)
            self.norm = (norm_layer or LayerNorm)(dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if lepe else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            f"{type(self).__name__} must not be compiled with torch.jit.script: its operations"
            " choose their implementation in Python. Use torch.compile, torch.export or"
            " torch.jit.trace"
        )

    def input_layers(self) -> list[nn.Module]:
        """The layers that read the mixer's input: a norm before the mixer folds into them."""
        if self.fused_qkv:
            return [self.qkv]
        return [self.q, self.sr if self.sr_ratio > 1 else self.kv]

    def norm_sites(self) -> list[NormSite]:
        return [NormSite(self, "norm", writer=self.sr)] if self.sr_ratio > 1 else []

    def set_input_size(self, grid: Grid) -> None:
        """Makes `grid` the usual one; position tables are resized."""
        self.grid = (grid[0], grid[1])

    def _parts(self, projected: Tensor, count: int) -> tuple[Tensor, ...]:
        """``projected`` (B, N, count * C) as `count` views (B, N, H, D).

        All at once: a view is a microsecond of the host, which eager mode waits for.
        """
        batch, tokens, _ = projected.shape
        heads = self.num_heads
        return projected.view(batch, tokens, count, heads, self.dim // heads).unbind(2)

    def _reduced_grid(self, grid: Grid) -> Grid:
        return grid[0] // self.sr_ratio, grid[1] // self.sr_ratio

    def project(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` (B, N, C) to q (B, N, H, D) and k, v (B, N', H, D), views where possible."""
        if self.fused_qkv:
            q, k, v = self._parts(self.qkv(x), 3)
            return q, k, v
        (q,) = self._parts(self.q(x), 1)
        if self.sr_ratio > 1:
            image = x.transpose(1, 2).unflatten(2, grid)
            x = self.norm(self.sr(image).flatten(2).transpose(1, 2))
        k, v = self._parts(self.kv(x), 2)
        return q, k, v

    def features(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """What `linear_attention` takes for ``q`` and for keys ``k`` that lie on `grid`."""
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """Attention of ``q`` (B, N, H, D) over keys that lie on `grid`: (B, N, H, D)."""
        if self.attention is None:
            raise NotImplementedError
        return linear_attention(*self.features(q, k, grid), v, **self.attention)

    def local_kernel(self, mean: Tensor | None) -> tuple[Tensor | FilterMlp, Tensor | None]:
        """Depthwise kernel (F, k, k) or (B, C, k, k), or what makes it, and bias (F) of the local
        term, F = C or D."""
        raise NotImplementedError

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mean: Tensor | None, grid: Grid) -> Tensor:
        """Attention and local term, before the output projection: (B, N, C).

        Args:
            q: ``(B, N, H, D)``.
            k: ``(B, N', H, D)``.
            v: ``(B, N', H, D)``.
            mean: ``(B, C)``, from which dynamic kernels are made; None where nothing reads it.
            grid: that of the queries.
        """
        if mean is not None and mean.dtype != v.dtype:
            mean = mean.to(v.dtype)  # as autocast does with what it projects
        weight, bias = self.local_kernel(mean)
        options: dict[str, Any] = {"grid": grid, "num_prefix_tokens": self.num_prefix_tokens}
        is_linear = getattr(self.attend, "__func__", None) is LinearMixer.attend
        if is_linear and self.attention is not None and self.sr_ratio == 1:
            q, k = self.features(q, k, grid)
            return linear_attention_conv2d(q, k, v, weight, bias, **options, **self.attention)
        out = self.attend(q, k, v, self._reduced_grid(grid)).flatten(2)
        values = v.flatten(2)
        if self.sr_ratio > 1:
            # Along the flattened tokens, not in the plane: how the official weights were trained.
            resized = F.interpolate(values.transpose(1, 2), size=q.shape[1], mode="linear")
            values = resized.transpose(1, 2).to(out.dtype)
        if isinstance(weight, FilterMlp):
            weight = weight.filters()
        return token_conv2d(values, weight, bias, residual=out, **options)

    def forward(self, x: Tensor, grid: Grid | None = None, context: Tensor | None = None) -> Tensor:
        """Mixes tokens.

        Args:
            x: ``(B, N, C)``, N = num_prefix_tokens + h * w.
            grid: ``(h, w)``; None is the usual one.
            context: ``(B, N, C)``, whose mean makes dynamic kernels; None is `x`.

        Returns:
            ``(B, N, C)``.
        """
        grid = self.grid if grid is None else (grid[0], grid[1])
        mean = (x if context is None else context).mean(dim=1) if self.reads_mean else None
        out = self.mix(*self.project(x, grid), mean, grid)
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return f"grid={self.grid}, num_heads={self.num_heads}, sr_ratio={self.sr_ratio}"
