"""LiT for text to image: PixArt with linear self-attention (arXiv:2501.12976)."""

from typing import Any, ClassVar, Self

from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import AttentionProcessor, AttnProcessor
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # (see models/__init__.py)
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from ..attention.linear import LiTAttention, LiTAttnProcessor
from ..attention.prompt import PromptAttention
from .linear_blocks import LinearTransformerMixin, install_linear_attention, token_grid
from .lit_pixart_block import LiTPixArtBlock


class LiTPixArtTransformer2DModel(LinearTransformerMixin, PixArtTransformer2DModel):
    """`PixArtTransformer2DModel` (alpha, Sigma) with linear self-attention of few heads.

    Cross-attention to the prompt (`attn2`) is that of PixArt, at PixArt's number of heads. Loads
    any PixArt configuration; latents may have any height and width that `patch_size` divides.

    Args (beyond `PixArtTransformer2DModel`):
        num_linear_heads: heads of the linear attention; None takes the divisor of the width with
            heads nearest to 256 channels, which is 4 for PixArt's 1152.
        linear_feature_map: feature map, see `lintra.kernels.linear_attention`.
        linear_eps: added to the denominator of the attention.
        linear_eps_features: added to the features, see `LiTAttention`; 0 for none.
        conv_kernel_size: side of the depthwise convolution on the values; 0 leaves it out.
        conv_shared: share its filters across heads.

    Raises:
        ValueError: `attention_type` is not "default": gated blocks attend fully to the image.
    """

    _no_split_modules = ["LiTPixArtBlock", "PatchEmbed"]
    _repeated_blocks = ["LiTPixArtBlock"]
    default_policy: ClassVar[str] = "with_out"

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
        num_linear_heads: int | None = None,
        linear_feature_map: str = "relu",
        linear_eps: float = 1e-6,
        linear_eps_features: float = 0.0,
        conv_kernel_size: int = 5,
        conv_shared: bool = True,
    ):
        if attention_type not in (None, "default"):
            raise ValueError(f"`attention_type` must be 'default', got {attention_type!r}")
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            cross_attention_dim=cross_attention_dim,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            interpolation_scale=interpolation_scale,
            use_additional_conditions=use_additional_conditions,
            caption_channels=caption_channels,
            attention_type=attention_type,
        )
        self.transformer_blocks: Any = nn.ModuleList(map(LiTPixArtBlock, self.transformer_blocks))
        install_linear_attention(
            self.transformer_blocks,
            self.inner_dim,
            num_linear_heads,
            bias=attention_bias,
            dropout=dropout,
            feature_map=linear_feature_map,
            eps=linear_eps,
            eps_features=linear_eps_features,
            conv_kernel_size=conv_kernel_size,
            conv_shared=conv_shared,
        )
        if cross_attention_dim is not None:
            for block in self.transformer_blocks:
                block.attn2 = PromptAttention(
                    query_dim=self.inner_dim,
                    cross_attention_dim=cross_attention_dim,
                    heads=num_attention_heads,
                    dim_head=attention_head_dim,
                    dropout=dropout,
                    bias=attention_bias,
                    upcast_attention=upcast_attention,
                )

    @classmethod
    def from_teacher(cls, teacher: ModelMixin, policy: str | None = None, **overrides: Any) -> Self:
        """A student of a PixArt model; see `LinearTransformerMixin.from_teacher`.

        The default policy is the paper's for text to image: all but the attention's q, k and v.

        Raises:
            ValueError: the teacher is no PixArt model, or see `inherit_weights`.
        """
        if not isinstance(teacher, PixArtTransformer2DModel):
            raise ValueError(f"`teacher` must be a PixArt model, got a {type(teacher).__name__}")
        # PixArt derives an unset value from `sample_size`, in which a student may differ.
        overrides = {"use_additional_conditions": teacher.use_additional_conditions, **overrides}
        return super().from_teacher(teacher, policy, **overrides)

    def set_attn_processor(
        self, processor: AttentionProcessor | dict[str, AttentionProcessor]
    ) -> None:
        """Sets one `LiTAttnProcessor` on all self-attention, or a processor for every layer.

        Args:
            processor: a `LiTAttnProcessor`, which leaves cross-attention alone, or a dict with the
                names of `attn_processors` that has one for each layer of either kind.

        Raises:
            ValueError: a single processor of another kind, which would bring full attention back.
        """
        if isinstance(processor, dict):
            # The parent empties the dict that it is given; each layer refuses the wrong kind.
            super().set_attn_processor(dict(processor))
            return
        if not isinstance(processor, LiTAttnProcessor):
            raise ValueError(
                "`processor` must be a LiTAttnProcessor or a dict with one for every layer, got"
                f" {type(processor).__name__}"
            )
        for module in self.modules():
            if isinstance(module, LiTAttention):
                module.set_processor(processor)

    def set_default_attn_processor(self) -> None:
        """Linear self-attention, and diffusers' plain cross-attention."""
        for module in self.modules():
            if isinstance(module, LiTAttention):
                module.set_processor(LiTAttnProcessor())
            elif isinstance(module, PromptAttention):
                module.set_processor(AttnProcessor())

    def fuse_qkv_projections(self) -> None:
        """Fuses q, k and v of the self-attention; PixArt's own method would make it softmax."""
        AttentionMixin.fuse_qkv_projections(self)

    def unfuse_qkv_projections(self) -> None:
        AttentionMixin.unfuse_qkv_projections(self)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts noise (and variance) of latents for a prompt.

        Args:
            hidden_states: latents ``(B, in_channels, height, width)``.
            encoder_hidden_states: prompt embeddings ``(B, L, caption_channels)``.
            timestep: ``(B,)``, in training steps of the scheduler.
            added_cond_kwargs: ``resolution`` and ``aspect_ratio`` for models that take them.
            cross_attention_kwargs: passed to both attention layers of each block.
            attention_mask: must be None.
            encoder_attention_mask: ``(B, L)``, 1 for tokens of the prompt and 0 for padding, or a
                bias ``(B, 1, L)``.
            return_dict: return `Transformer2DModelOutput` instead of a tuple.

        Returns:
            ``sample`` of shape ``(B, out_channels, height, width)``.

        Raises:
            ValueError: the patch size does not divide height and width, no prompt embeddings, or a
                mask for self-attention.
        """
        if encoder_hidden_states is None and self.config.cross_attention_dim is not None:
            # diffusers' cross-attention would attend to the image instead, all to all.
            raise ValueError("`encoder_hidden_states` must be prompt embeddings, got None")
        grid = token_grid(hidden_states, self.config.patch_size)
        return super().forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs=added_cond_kwargs,
            cross_attention_kwargs={**(cross_attention_kwargs or {}), "grid": grid},
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=return_dict,
        )
