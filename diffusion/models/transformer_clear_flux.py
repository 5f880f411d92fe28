"""FLUX with the local attention of CLEAR (Liu et al. 2024, arXiv:2412.16112)."""

from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (see models/__init__.py)
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxTransformer2DModel
from torch import Tensor

from .clear import ClearMixin, check_spatial_shape
from .flux_blocks import fuse_blocks
from .image_ids import exact_ids, grid_of_ids

if TYPE_CHECKING:
    from ..row_shards import RowShard

_ROPE_THETA = 10000


class ClearFluxTransformer2DModel(ClearMixin, FluxTransformer2DModel):
    """`FluxTransformer2DModel` in which image tokens see a disc of the image and all text.

    Takes the configuration and the state dict of the stock model and its place in every FLUX
    pipeline. Text tokens attend to everything.

    `joint_attention_kwargs` may set for one call: `radius`, `proportional_scale`, `ntk_factor`
    and ``spatial_shape``, the grid ``(h, w)`` in tokens. The grid otherwise comes from `img_ids`,
    for which the host waits for the device; pass it to compile the model as one graph.
    ``process_group`` splits the rows of the image over the ranks of a torch.distributed group, to
    sample one image on several devices: each rank calls with the same inputs and gets the same
    output.

    Args (beyond `FluxTransformer2DModel`):
        radius: of the disc, in tokens of 16 x 16 pixels; at least 1. The paper has 8, 16, 32.
        down_factor: d; image tokens also see keys and values of the whole image, pooled d x d
            (the paper has 4); None for none. The grid must be divisible by it.
        proportional_scale: scale the logits with the number of tokens, as the paper does above
            the training size; see `proportional_attention_scale`.
        ntk_factor: multiplies the base 10000 of the rotary positions; the paper has 10 above the
            training size.
        full_attention_layers: numbers of the layers that keep full attention; single blocks are
            counted after the double blocks.
    """

    _block_lists = ("transformer_blocks", "single_transformer_blocks")

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        radius: float = 16,
        down_factor: int | None = None,
        proportional_scale: bool = False,
        ntk_factor: float = 1.0,
        full_attention_layers: tuple[int, ...] = (),
    ):
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        fuse_blocks(self)
        self._use_local_attention()
        self.pos_embed = self._rotary(ntk_factor)

    def _rotary(self, ntk_factor: float) -> FluxPosEmbed:
        return FluxPosEmbed(_ROPE_THETA * ntk_factor, self.config.axes_dims_rope)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts the velocity of packed latents; arguments as in `FluxTransformer2DModel`.

        Args:
            hidden_states: ``(B, h * w, in_channels)``, row-major.
            img_ids: ``(h * w, 3)``, (0, row, column); half precision may have rounded them.
            joint_attention_kwargs: see the class; others are passed on.

        Returns:
            ``sample`` of shape ``(B, h * w, out_channels)``.

        Raises:
            ValueError: the grid does not hold the tokens, or `img_ids` do not number one; what
                the processors and `local_attention` refuse.
            NotImplementedError: a `process_group` while gradients are recorded.
        """
        if img_ids is None or txt_ids is None:
            raise ValueError("`img_ids` and `txt_ids` must be tensors (N, 3), got None")
        img_ids, txt_ids = (ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids))
        kwargs, call = self._call_arguments(joint_attention_kwargs)
        num_tokens = hidden_states.shape[1]
        if "spatial_shape" in kwargs:
            spatial_shape = check_spatial_shape(kwargs["spatial_shape"], num_tokens)
        else:
            spatial_shape = check_spatial_shape(grid_of_ids(img_ids), num_tokens)
        img_ids = exact_ids(img_ids, spatial_shape)

        group = kwargs.pop("process_group", None)
        if group is not None:
            shard = self._shard(spatial_shape, group)
            call["shard"] = shard
            own = slice(shard.rows.start * spatial_shape[1], shard.rows.stop * spatial_shape[1])
            hidden_states, img_ids = hidden_states[:, own], img_ids[own]
            controlnet_block_samples, controlnet_single_block_samples = (
                None if samples is None else [sample[:, own] for sample in samples]
                for samples in (controlnet_block_samples, controlnet_single_block_samples)
            )

        ntk_factor = call.pop("ntk_factor")
        if ntk_factor != self.config.ntk_factor:
            ids = torch.cat([txt_ids, img_ids])
            call["rotary_emb"] = self._rotary(ntk_factor)(ids)
        output = super().forward(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            joint_attention_kwargs={**kwargs, **call, "spatial_shape": spatial_shape},
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
            return_dict=False,
            controlnet_blocks_repeat=controlnet_blocks_repeat,
        )
        if group is not None:
            output = (self._gather(output[0], spatial_shape, shard), *output[1:])
        return Transformer2DModelOutput(sample=output[0]) if return_dict else output

    def _shard(self, spatial_shape: tuple[int, int], group: Any) -> "RowShard":
        from ..row_shards import RowShard, row_split

        if torch.is_grad_enabled():
            raise NotImplementedError(
                "`process_group` must be None while gradients are recorded: only sampling is split"
            )
        multiple = self.config.down_factor or 1
        return RowShard(row_split(spatial_shape[0], group.size(), multiple), group)

    @staticmethod
    def _gather(tokens: Tensor, spatial_shape: tuple[int, int], shard: "RowShard") -> Tensor:
        from ..row_shards import gather_tokens

        counts = [len(rows) * spatial_shape[1] for rows in shard.split]
        return gather_tokens(tokens, counts, shard.group)
