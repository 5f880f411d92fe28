"""LiT, a class-conditional diffusion transformer with linear attention (arXiv:2501.12976)."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (see models/__init__.py)
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from .block_conditions import BlockConditions
from .block_runs import BlockRuns
from .linear_blocks import LinearTransformerMixin, install_linear_attention, token_grid
from .lit_block import LiTBlock, embed_condition
from .modulation import modulated
from .transformer_dit import DIFFUSERS_TIME_FREQ_SHIFT, set_time_freq_shift


class LiTTransformer2DModel(LinearTransformerMixin, AttentionMixin, DiTTransformer2DModel):
    """`DiTTransformer2DModel` with linear self-attention of few heads and a convolution on values.

    Loads any DiT configuration; the extra arguments are those of the attention. Latents may have
    any height and width that `patch_size` divides: the sin-cos table is made for their grid.

    Args (beyond `DiTTransformer2DModel`):
        num_linear_heads: heads of the linear attention; None takes 2, 3, 4, 4 for the widths of
            S, B, L, XL and the divisor with heads nearest to 256 channels for others.
        linear_feature_map: feature map, see `lintra.kernels.linear_attention`.
        linear_eps: added to the denominator of the attention.
        linear_eps_features: added to the features, see `LiTAttention`; 0 for none.
        conv_kernel_size: side of the depthwise convolution on the values; 0 leaves it out.
        conv_shared: share its filters across heads.
        time_freq_shift: see `OfficialDiTTransformer2DModel`; the default is that of diffusers.
        interpolation_scale: divides the positions of the sin-cos table. A model that goes on at
            twice the `sample_size` keeps the positions it knows with 2 (the table resized); with 1
            the table is extended beyond them.
    """

    _no_split_modules = ["LiTBlock"]
    _repeated_blocks = ["LiTBlock"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        num_linear_heads: int | None = None,
        linear_feature_map: str = "relu",
        linear_eps: float = 1e-6,
        linear_eps_features: float = 0.0,
        conv_kernel_size: int = 5,
        conv_shared: bool = True,
        time_freq_shift: float = DIFFUSERS_TIME_FREQ_SHIFT,
        interpolation_scale: float = 1.0,
    ):
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        if not interpolation_scale > 0:
            raise ValueError(f"`interpolation_scale` must be positive, got {interpolation_scale}")
        if interpolation_scale != 1:
            self.pos_embed = PatchEmbed(
                height=sample_size,
                width=sample_size,
                patch_size=patch_size,
                in_channels=in_channels,
                embed_dim=self.inner_dim,
                interpolation_scale=interpolation_scale,
            )
        self.transformer_blocks: Any = nn.ModuleList(map(LiTBlock, self.transformer_blocks))
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
        set_time_freq_shift(self, time_freq_shift)
        self._conditions = BlockConditions()
        self._runs = BlockRuns()

    def compile_runs(self, **options: Any) -> None:
        """Compiles runs of blocks, see `BlockRuns`; `options` are those of `torch.compile`."""
        self._runs.compile(**options)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts noise (and variance) of latents.

        Args:
            hidden_states: latents ``(B, in_channels, height, width)``.
            timestep: ``(B,)``, in training steps of the scheduler.
            class_labels: ``(B,)`` int64; `num_embeds_ada_norm` is the label of "no class".
            cross_attention_kwargs: passed to the attention modules; none are needed.
            return_dict: return `Transformer2DModelOutput` instead of a tuple.

        Returns:
            ``sample`` of shape ``(B, out_channels, height, width)``.

        Raises:
            ValueError: the patch size does not divide height and width.
        """
        patch = self.patch_size
        height, width = hidden_states.shape[-2:]
        grid = token_grid(hidden_states, patch)
        attention_kwargs = {**(cross_attention_kwargs or {}), "grid": grid}
        # The convolution leaves channels first, which sums would keep through all blocks.
        hidden_states = self.pos_embed(hidden_states).contiguous()  # (B, N, C)
        embedding = self.transformer_blocks[0].norm1.emb
        time_features = embedding.time_proj(timestep).to(hidden_states.dtype)

        modulations = self._conditions(self.transformer_blocks, time_features, class_labels)

        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        hidden_states = self._runs(
            self.transformer_blocks,
            hidden_states,
            time_features,
            class_labels,
            attention_kwargs,
            modulations,
            checkpoint=self._gradient_checkpointing_func if checkpointing else None,
        )

        condition = embed_condition(embedding, time_features, class_labels)
        shift, scale = self.proj_out_1(F.silu(condition)).chunk(2, dim=1)
        hidden_states = modulated(self.norm_out, hidden_states, scale, shift)
        hidden_states = self.proj_out_2(hidden_states)  # (B, N, patch * patch * out_channels)

        patches = hidden_states.unflatten(2, (patch, patch, self.out_channels)).unflatten(1, grid)
        output = patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
