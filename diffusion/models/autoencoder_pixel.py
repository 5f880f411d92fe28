"""An autoencoder that only rearranges, so that pixel-space models run in latent pipelines."""

from typing import Self

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (see models/__init__.py)
from torch import Tensor
from torch.nn import functional as F


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

    With two entries or more in `block_out_channels`, squares of pixels become channels
    (`pixel_unshuffle`), for models whose patches are larger than their own patch size.
    `decode` repeats a single channel three times, because pipelines convert to RGB pictures.

    Args:
        in_channels: channels of the images, 1 or 3.
        scaling_factor, shift_factor: always 1 and 0; pipelines divide latents by and add them.
        block_out_channels: all entries 1; pipelines take the side of a latent from their number n,
            which is 1 / 2^(n - 1) of the image's. Latents have ``in_channels 4^(n - 1)`` channels.
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
        if not block_out_channels or set(block_out_channels) != {1}:
            raise ValueError(f"`block_out_channels` must be ones, got {block_out_channels}")
        # Pipelines ask a module for its dtype and device, which a module without tensors lacks.
        self.register_buffer("anchor", torch.zeros(1))

    @classmethod
    def of_latents(cls, channels: int) -> Self:
        """The one whose latents have ``3 4^k`` channels, of RGB, or ``4^k``, of grey images.

        Raises:
            ValueError: another number.
        """
        own = 3 if channels % 3 == 0 else 1
        halvings = (max(channels // own, 1).bit_length() - 1) // 2
        if own * 4**halvings != channels:
            raise ValueError(f"`channels` must be 1 or 3 times a power of 4, got {channels}")
        return cls(own, block_out_channels=(1,) * (halvings + 1))

    @property
    def patch_size(self) -> int:
        """Pixels of a latent's side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Images (B, C, p h, p w) to a distribution that is nothing but them, (B, p^2 C, h, w)."""
        distribution = _PointDistribution(F.pixel_unshuffle(x, self.patch_size))
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, p^2 C, h, w) to images (B, 3, p h, p w)."""
        image = F.pixel_shuffle(z, self.patch_size)
        if self.config.in_channels == 1:
            image = image.expand(-1, 3, -1, -1)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        return self.decode(sample, return_dict)
