"""Linear self-attention of LiT (Wang et al. 2025, arXiv:2501.12976) as a diffusers module."""

from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from lintra.kernels import linear_attention, linear_attention_conv2d, token_conv2d
from lintra.kernels.linear_attention.reference import FEATURE_MAPS

from ..untouched import is_unhooked, is_untouched


class LiTAttnProcessor:
    """Computes `LiTAttention`; holds no state, so one instance may serve every layer."""

    def __call__(
        self,
        attn: "LiTAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            raise ValueError(
                "`encoder_hidden_states` must be None: LiT's attention is self-attention"
            )
        if attention_mask is not None:
            raise ValueError("`attention_mask` must be None: linear attention takes no mask")
        if attn.fused_projections:
            assert isinstance(attn.to_qkv, nn.Linear)
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # (B, N, C) each
        else:
            query = attn.to_q(hidden_states)
            key = attn.to_k(hidden_states)
            value = attn.to_v(hidden_states)
        feature_map, eps = attn.feature_map, attn.eps
        if attn.eps_features:
            phi = FEATURE_MAPS[feature_map]
            query, key = (phi(x) + attn.eps_features for x in (query, key))
            feature_map, eps = "identity", eps * key.shape[1]
        dwc = attn.dwc
        if dwc is not None and grid is None:
            raise ValueError("`grid` must be (height, width) in tokens, got None")
        shape = (*query.shape[:2], attn.heads, -1)
        by_head = query.view(shape), key.view(shape), value.view(shape)
        if dwc is not None and grid is not None and is_untouched(dwc, ValueConv2d):
            out = linear_attention_conv2d(
                *by_head, dwc.weight.squeeze(1), dwc.bias,
                grid=grid, feature_map=feature_map, eps=eps,
            )  # fmt: skip
        else:
            out = linear_attention(*by_head, feature_map=feature_map, eps=eps).flatten(2)
            if dwc is not None:
                out = dwc(value, grid=grid, residual=out)
        out, dropout = attn.to_out[0](out), attn.to_out[1]
        if type(dropout) is nn.Dropout and not dropout.training and is_unhooked(dropout):
            return out  # what calling it would give, later
        return dropout(out)


class ValueConv2d(nn.Conv2d):
    """Depthwise convolution of values on the token grid, added to a residual.

    A module of its own, not parameters of the attention: hooks that bring weights to the device or
    to the computing dtype (offloading, layerwise casting) act on the forward call of a module.

    Args:
        filters: number of filters, repeated along the channels: head channels to share them across
            heads, all channels not to.
        kernel_size: odd side.

    Shapes: ``tokens`` and ``residual`` (B, h * w, C), `filters` dividing C, with ``grid=(h, w)``.
    """

    def __init__(self, filters: int, kernel_size: int):
        super().__init__(filters, filters, kernel_size, groups=filters)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, *, grid: tuple[int, int], residual: Tensor
    ) -> Tensor:
        weight = self.weight.squeeze(1)
        return token_conv2d(tokens, weight, self.bias, grid=grid, residual=residual)


class LiTAttention(nn.Module, AttentionModuleMixin):
    """``to_out(concat_h(phi(q) S / (phi(q) . z + eps)) + DWC(v))``, the attention of a LiT block.

    S and z are the moments of `lintra.kernels.linear_attention`; DWC is a depthwise convolution of
    the values on the token grid. Its filters are shared across heads (one per head channel) unless
    `conv_shared` is False (one per channel).

    Args:
        dim: channels C of the tokens.
        heads: number of heads; few, so that a head is 192 to 288 wide (paper, free lunch on heads).
        bias: biases of the three input projections.
        dropout: after the output projection.
        feature_map: see `linear_attention`.
        eps: added to the denominator.
        eps_features: above 0 the features are ``phi(x) + eps_features`` and `eps` counts once a
            key, as in later code of LiT's first author (LINA, arXiv:2601.22630; 1e-6 for both): a
            query without a positive channel then sees a mean instead of nothing. It costs a pass
            over queries and keys.
        conv_kernel_size: odd side of the convolution; 0 leaves it out.
        conv_shared: share the filters across heads.

    Shapes: ``hidden_states`` (B, h * w, C) -> (B, h * w, C), with ``grid=(h, w)`` in the call.
    """

    _default_processor_cls = LiTAttnProcessor
    _available_processors = [LiTAttnProcessor]
    # What guidance that perturbs self-attention asks of every attention layer.
    is_cross_attention = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        feature_map: str = "relu",
        eps: float = 1e-6,
        eps_features: float = 0.0,
        conv_kernel_size: int = 5,
        conv_shared: bool = True,
    ):
        super().__init__()
        if heads < 1 or dim % heads != 0:
            raise ValueError(f"`heads` must divide the {dim} channels, got {heads}")
        if conv_kernel_size != 0 and (conv_kernel_size < 0 or conv_kernel_size % 2 == 0):
            raise ValueError(
                f"`conv_kernel_size` must be odd, or 0 for none, got {conv_kernel_size}"
            )
        if feature_map not in FEATURE_MAPS:
            names = ", ".join(FEATURE_MAPS)
            raise ValueError(f"`feature_map` must be one of {names}, got {feature_map!r}")
        if not eps_features >= 0:
            raise ValueError(f"`eps_features` must not be negative, got {eps_features}")
        self.heads = heads
        self.query_dim = self.inner_dim = dim
        self.use_bias = bias
        self.feature_map = feature_map
        self.eps = eps
        self.eps_features = eps_features
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])
        filters = dim // heads if conv_shared else dim
        self.dwc = ValueConv2d(filters, conv_kernel_size) if conv_kernel_size else None
        self.set_processor(LiTAttnProcessor())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections with zero bias; the convolution keeps PyTorch's default."""
        for linear in (self.to_q, self.to_k, self.to_v, self.to_out[0]):
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.dwc is not None:
            self.dwc.reset_parameters()

    def set_processor(self, processor: LiTAttnProcessor) -> None:
        """Accepts only `LiTAttnProcessor`: any other would silently bring full attention back."""
        if not isinstance(processor, LiTAttnProcessor):
            raise ValueError(
                f"`processor` must be a LiTAttnProcessor, got {type(processor).__name__}"
            )
        self.processor = processor

    def set_attention_slice(self, slice_size: int | None) -> None:
        """Nothing to do: there is no attention matrix, which diffusers would compute in slices."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, grid)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, feature_map={self.feature_map!r}, eps={self.eps}"
