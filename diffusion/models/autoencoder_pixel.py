"""An autoencoder that does nothing, so that pixel-space models run in latent pipelines."""

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (see models/__init__.py)
from torch import Tensor


class _PointDistribution:
    """A posterior without spread: the image itself."""

    def __init__(self, mean: Tensor):
        self.mean = mean
        self.std = mean.new_zeros(()).expand_as(mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.mean

    def mode(self) -> Tensor:
        return self.mean


class PixelAutoencoder(AutoencoderKL):
    """Identity in the place of an `AutoencoderKL`: latents are images in [-1, 1].

    `decode` repeats a single channel three times, because pipelines convert to RGB pictures.

    Args:
        in_channels: channels of the images, 1 or 3.
        scaling_factor, shift_factor: always 1 and 0; pipelines divide latents by and add them.
        block_out_channels: always one entry; pipelines take the side of a latent from their number.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] = (1,),
    ):
        # An AutoencoderKL only in type, which pipelines check: its layers are not built.
        super(AutoencoderKL, self).__init__()
        if in_channels not in (1, 3):
            raise ValueError(f"`in_channels` must be 1 or 3, got {in_channels}")
        if scaling_factor != 1.0:
            raise ValueError(f"`scaling_factor` must be 1.0, got {scaling_factor}")
        if shift_factor != 0.0:
            raise ValueError(f"`shift_factor` must be 0.0, got {shift_factor}")
        if len(block_out_channels) != 1:
            raise ValueError(f"`block_out_channels` must have one entry, got {block_out_channels}")
        # Pipelines ask a module for its dtype and device, which a module without tensors lacks.
        self.register_buffer("anchor", torch.zeros(1))

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Images (B, C, H, W) to a distribution that holds nothing but them."""
        distribution = _PointDistribution(x)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, H, W) to images (B, 3, H, W)."""
        image = z.expand(-1, 3, -1, -1) if self.config.in_channels == 1 else z
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        return self.decode(sample, return_dict)
