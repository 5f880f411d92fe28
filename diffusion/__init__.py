"""Diffusion transformers with linear attention for diffusers, and the tools to distil them."""

from .attention.guard import assert_linear
from .inheritance import InheritanceReport, inherit_weights
from .io import load_pipeline, load_transformer, swap_transformer
from .models.autoencoder_pixel import PixelAutoencoder
from .models.transformer_dit import OfficialDiTTransformer2DModel
from .models.transformer_lit import LiTTransformer2DModel
from .models.transformer_lit_pixart import LiTPixArtTransformer2DModel

__all__ = [
    "InheritanceReport",
    "LiTPixArtTransformer2DModel",
    "LiTTransformer2DModel",
    "OfficialDiTTransformer2DModel",
    "PixelAutoencoder",
    "assert_linear",
    "inherit_weights",
    "load_pipeline",
    "load_transformer",
    "swap_transformer",
]
