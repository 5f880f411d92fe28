"""Stable Diffusion 3 with the local attention of CLEAR (Liu et al. 2024, arXiv:2412.16112)."""

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (see models/__init__.py)
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from .clear import ClearMixin, check_spatial_shape


class ClearSD3Transformer2DModel(ClearMixin, SD3Transformer2DModel):
    """`SD3Transformer2DModel` in which image tokens see a disc of the image and all text.

    Takes the configuration and the state dict of the stock model (SD3 and SD3.5) and its place in
    every SD3 pipeline. The second, image-only attention of SD3.5 is local too.

    `joint_attention_kwargs` may set for one call: `radius` and `proportional_scale`.

    Args (beyond `SD3Transformer2DModel`):
        radius: of the disc, in tokens of `patch_size` latents; at least 1.
        down_factor: d; image tokens also see keys and values of the whole image, pooled d x d;
            None for none. The grid must be divisible by it.
        proportional_scale: scale the logits with the number of tokens, see
            `proportional_attention_scale`.
        ntk_factor: must be 1: SD3 has no rotary positions. There for the sake of one
            configuration for all CLEAR models.
        full_attention_layers: numbers of the blocks that keep full attention.
    """

    # As upstream has it for FLUX: lets `compile_repeated_blocks` find them.
    _repeated_blocks = ["JointTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        radius: float = 16,
        down_factor: int | None = None,
        proportional_scale: bool = False,
        ntk_factor: float = 1.0,
        full_attention_layers: tuple[int, ...] = (),
    ):
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        )
        self._use_local_attention()
        self._check_ntk_factor(ntk_factor)

    @staticmethod
    def _check_ntk_factor(ntk_factor: float) -> None:
        if ntk_factor != 1:
            raise ValueError(
                f"`ntk_factor` must be 1, got {ntk_factor}: SD3 has no rotary positions"
            )

    def fuse_qkv_projections(self) -> None:
        """Computes query, key and value with one product each for image and text."""
        for _, _, attention in self._attention_layers():
            # Upstream also sets a processor, of full attention.
            attention.fuse_projections()

    def unfuse_qkv_projections(self) -> None:
        """Goes back to separate projections, whose weights fusing has left as they were."""
        for _, _, attention in self._attention_layers():
            _unfuse(attention)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        block_controlnet_hidden_states: list[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts the velocity of latents; arguments as in `SD3Transformer2DModel`.

        Args:
            hidden_states: latents ``(B, in_channels, height, width)``.
            joint_attention_kwargs: see the class; others are passed on.

        Returns:
            ``sample`` of shape ``(B, out_channels, height, width)``.

        Raises:
            ValueError: the patch size does not divide height and width; what the processors and
                `local_attention` refuse.
        """
        patch = self.config.patch_size
        height, width = hidden_states.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(
                f"`hidden_states` must have a height and width that the patch size {patch} divides,"
                f" got {height} x {width}"
            )
        grid = (height // patch, width // patch)
        kwargs, call = self._call_arguments(joint_attention_kwargs)
        self._check_ntk_factor(call.pop("ntk_factor"))
        if kwargs.pop("process_group", None) is not None:
            raise NotImplementedError("`process_group` must be None: SD3 is not split over devices")
        if check_spatial_shape(kwargs.get("spatial_shape", grid), grid[0] * grid[1]) != grid:
            raise ValueError(
                f"`spatial_shape` must be that of the latents, {grid}, got"
                f" {kwargs['spatial_shape']}"
            )
        return super().forward(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            block_controlnet_hidden_states=block_controlnet_hidden_states,
            joint_attention_kwargs={**kwargs, **call, "spatial_shape": grid},
            return_dict=return_dict,
            skip_layers=skip_layers,
        )


def _unfuse(attention: Attention) -> None:
    for name in ("to_qkv", "to_added_qkv"):
        if hasattr(attention, name):
            delattr(attention, name)
    attention.fused_projections = False
