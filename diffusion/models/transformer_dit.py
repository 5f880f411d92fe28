"""DiT as its authors' code computes it (arXiv:2212.09748), as a diffusers model."""

from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (see models/__init__.py)
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

# Value of `time_freq_shift` with which diffusers' own DiT is built.
DIFFUSERS_TIME_FREQ_SHIFT = 1.0


def set_time_freq_shift(model: DiTTransformer2DModel, shift: float) -> None:
    """Sets the frequencies of the time embedding, ``10000 ** (-i / (128 - shift))``, in place."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift


class OfficialDiTTransformer2DModel(DiTTransformer2DModel):
    """`DiTTransformer2DModel` that gives what the authors' code gives for the same weights.

    diffusers' class differs in two numbers: its time frequencies are ``10000 ** (-i / 127)``, the
    authors' ``10000 ** (-i / 128)``, which moves outputs by more than their own size at late
    steps, and its normalisation adds 1e-5 where theirs adds 1e-6. Both are configuration here,
    with the authors' values as defaults. The state dict is that of `DiTTransformer2DModel`.

    Args (beyond `DiTTransformer2DModel`):
        time_freq_shift: 0 for the authors' frequencies, 1 for those of diffusers.
    """

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
        norm_eps: float = 1e-6,
        time_freq_shift: float = 0.0,
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
        set_time_freq_shift(self, time_freq_shift)
