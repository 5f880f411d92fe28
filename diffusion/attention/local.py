"""Local attention of CLEAR (Liu et al. 2024, arXiv:2412.16112) as a diffusers processor."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from lintra.kernels import local_attention

from .rotary import Part, normalize_and_rotate

if TYPE_CHECKING:
    from ..row_shards import RowShard

# The tokens of FLUX's training size, 64^2 + 512: there proportional attention changes nothing.
_TRAINING_TOKENS = 4608
# What the authors count every token for where pooled keys exist.
_POOLED_COUNT = 10
_Method = TypeVar("_Method", bound=Callable[..., Any])


def proportional_attention_scale(num_tokens: int, head_dim: int, pooled: bool = False) -> float:
    """``sqrt(log_4608(n) / head_dim)``: keeps the entropy of attention over more tokens.

    Args:
        num_tokens: text and image tokens, pooled ones not counted.
        head_dim: channels of a head.
        pooled: the layer has pooled keys; ``n = 10 num_tokens`` then, else ``n = num_tokens``.
    """
    count = num_tokens * (_POOLED_COUNT if pooled else 1)
    return math.sqrt(math.log(count, _TRAINING_TOKENS) / head_dim)


def _with_signature(method: _Method) -> _Method:
    """Makes the signature once: diffusers reads it at every call, some 50 us of the host."""
    method.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return method


class ClearAttnProcessor(nn.Module):
    """Exact softmax attention in which an image token sees a disc of the image, and all text.

    Serves `FluxAttention` (double and single blocks) and the `Attention` of SD3 (joint, and
    image only), with separate or fused projections. The grid, the radius and the scale come with
    each call, in `joint_attention_kwargs`; a processor without pooled keys holds nothing, so that
    one may serve every layer.

    Args:
        down_factor: d; None for no pooled keys. Otherwise image queries also see the keys and
            values of the whole image, pooled d x d with one learned kernel per layer,
            `spatial_weight`, which starts as the mean (the paper's down-sampled variant).
        full_attention: the layer is left as it is: every token sees every token.
    """

    # Where diffusers' `set_attention_backend` puts its choice; only full attention has one.
    _attention_backend = None

    def __init__(
        self,
        down_factor: int | None = None,
        full_attention: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.down_factor = down_factor
        self.full_attention = full_attention
        self.spatial_weight: nn.Parameter | None = None
        if down_factor is not None:
            shape = (1, 1, 1, down_factor, 1, down_factor, 1)
            self.spatial_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes the pooling a mean."""
        if self.spatial_weight is not None:
            # Not through nn.init, which diffusers turns off while it loads a checkpoint; one that
            # lacks the weight relies on this.
            with torch.no_grad():
                self.spatial_weight.fill_(1 / self.spatial_weight.numel())

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A stock model has no pooling: its state dict is complete and leaves ours as it is.
        if f"{prefix}spatial_weight" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, tokens: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
        """Pools image tokens ``(B, h * w, H, D)`` to ``(B, h / d * w / d, H, D)``."""
        assert self.spatial_weight is not None
        factor = self.spatial_weight.shape[3]
        height, width = spatial_shape
        if height % factor or width % factor:
            raise ValueError(
                f"`spatial_shape` must have sides that the down factor {factor} divides,"
                f" got {height} x {width}"
            )
        blocks = tokens.unflatten(1, (height // factor, factor, width // factor, factor))
        weight = self.spatial_weight.view(factor, factor).to(tokens.dtype)
        return torch.einsum("byixjhc,ij->byxhc", blocks, weight).flatten(1, 2)

    @_with_signature
    def __call__(
        self,
        attn: Attention | AttentionModuleMixin,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        spatial_shape: tuple[int, int] | None = None,
        radius: float | None = None,
        proportional_scale: bool = False,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        shard: "RowShard | None" = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of one layer. The modules of diffusers read this signature.

        Args:
            attn: the module whose projections and norms are used.
            hidden_states: image tokens ``(B, h * w, C)``, or text and image tokens in this order.
            encoder_hidden_states: text tokens ``(B, T, C)`` of a joint layer.
            attention_mask: must be None.
            image_rotary_emb: cosines and sines ``(T + h * w, D)``, text first.
            spatial_shape: ``(h, w)``, in tokens.
            radius: of the disc, in tokens.
            proportional_scale: use `proportional_attention_scale` instead of ``1 / sqrt(D)``.
            rotary_emb: takes the place of `image_rotary_emb`.
            shard: the image tokens are the rows of one rank, of a grid `spatial_shape`.

        Returns:
            Image tokens and text tokens for a joint layer, otherwise all tokens.

        Raises:
            ValueError: a mask; no grid or radius; a grid that does not fit the tokens or that the
                down factor does not divide.
        """
        if attention_mask is not None:
            raise ValueError("`attention_mask` must be None: local attention takes no mask")
        image, value = _project(attn, hidden_states, text=False)
        parts = [image]
        if encoder_hidden_states is not None:
            # Text first, as the operation wants it: attention does not mind the order.
            text, text_value = _project(attn, encoder_hidden_states, text=True)
            parts, value = [text, image], torch.cat((text_value, value), dim=1)
        tables = image_rotary_emb if rotary_emb is None else rotary_emb
        query, key = normalize_and_rotate(parts, tables)
        # Under autocast the norms give float32, the projections do not.
        query, key = query.to(value.dtype), key.to(value.dtype)

        settings = (spatial_shape, radius, proportional_scale)
        if shard is None:
            out = self._attend(query, key, value, *settings).flatten(2)
        else:
            out = self._attend_sharded(query, key, value, *settings, shard).flatten(2)
        if encoder_hidden_states is None:
            return out if attn.pre_only else _project_out(attn, out)
        num_text = encoder_hidden_states.shape[1]
        # Contiguous, as they are for one sample: otherwise the bias is added in a pass of its own.
        text_out, image_out = (x.contiguous() for x in (out[:, :num_text], out[:, num_text:]))
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return _project_out(attn, image_out), text_out

    def _scale(self, num_tokens: int, head_dim: int) -> float:
        return proportional_attention_scale(
            num_tokens, head_dim, pooled=self.spatial_weight is not None
        )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spatial_shape: tuple[int, int] | None,
        radius: float | None,
        proportional_scale: bool,
    ) -> Tensor:
        """``(B, T + h * w, H, D)`` each, text first."""
        num_tokens, _, head_dim = query.shape[1:]
        scale = self._scale(num_tokens, head_dim) if proportional_scale else None
        if self.full_attention:
            return dispatch_attention_fn(
                query, key, value, scale=scale, backend=self._attention_backend
            )
        if spatial_shape is None or radius is None:
            name, what = ("radius", "a number") if spatial_shape else ("spatial_shape", "(h, w)")
            raise ValueError(f"`{name}` must be {what} in joint_attention_kwargs, got None")
        height, width = spatial_shape
        num_text = num_tokens - height * width
        if num_text < 0:
            raise ValueError(
                f"`spatial_shape` must fit into the {num_tokens} tokens, got {height} x {width}"
            )
        extra_key = extra_value = None
        if self.spatial_weight is not None:
            # Through nn.Module, so that hooks which bring an offloaded weight here see the call.
            extra_key, extra_value = (
                super(ClearAttnProcessor, self).__call__(tokens[:, num_text:], spatial_shape)
                for tokens in (key, value)
            )
        out = local_attention(
            query,
            key,
            value,
            grid=(height, width),
            radius=radius,
            num_prefix=num_text,
            scale=scale,
            extra_key=extra_key,
            extra_value=extra_value,
        )
        assert isinstance(out, Tensor)
        return out

    def _attend_sharded(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spatial_shape: tuple[int, int] | None,
        radius: float | None,
        proportional_scale: bool,
        shard: "RowShard",
    ) -> Tensor:
        """As `_attend`, on the text and the rows of this rank."""
        from ..parallel import parallel_local_attention
        from ..row_shards import gather_tokens

        assert spatial_shape is not None  # the model that made the shard
        assert radius is not None
        height, width = spatial_shape
        num_text = query.shape[1] - len(shard.rows) * width
        scale = None
        if proportional_scale:
            scale = self._scale(num_text + height * width, query.shape[-1])
        extra_key = extra_value = None
        if self.down_factor is not None:
            factor = self.down_factor
            counts = [len(rows) // factor * (width // factor) for rows in shard.split]
            own = (len(shard.rows), width)
            extra_key, extra_value = (
                gather_tokens(
                    super(ClearAttnProcessor, self).__call__(tokens[:, num_text:], own),
                    counts,
                    shard.group,
                )
                for tokens in (key, value)
            )
        return parallel_local_attention(
            query,
            key,
            value,
            grid=spatial_shape,
            # A disc as wide as the image is full attention.
            radius=height + width if self.full_attention else radius,
            num_prefix=num_text,
            scale=scale,
            extra_key=extra_key,
            extra_value=extra_value,
            split=shard.split,
            group=shard.group,
        )

    def extra_repr(self) -> str:
        return f"down_factor={self.down_factor}, full_attention={self.full_attention}"


def _project(attn: Any, hidden_states: Tensor, *, text: bool) -> tuple[Part, Tensor]:
    """Query and key with their norms, and value, ``(B, N, H, D)`` each."""
    if attn.fused_projections:
        fused = attn.to_added_qkv if text else attn.to_qkv
        tokens = fused(hidden_states).chunk(3, dim=-1)
    else:
        names = ("add_{}_proj" if text else "to_{}").format
        tokens = [getattr(attn, names(part))(hidden_states) for part in "qkv"]
    # A fixed head size, because tensor parallelism leaves a rank only some of the heads.
    head_dim = attn.inner_dim // attn.heads
    query, key, value = (x.unflatten(-1, (-1, head_dim)) for x in tokens)
    norms = (attn.norm_added_q, attn.norm_added_k) if text else (attn.norm_q, attn.norm_k)
    return (query, key, *norms), value


def _project_out(attn: Any, tokens: Tensor) -> Tensor:
    for layer in attn.to_out:
        tokens = layer(tokens)
    return tokens
