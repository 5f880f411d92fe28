"""Diffusion transformers with linear attention for diffusers, and the tools to distil them."""

from .attention.guard import assert_linear
from .cascade_plan import Stage, plan_stages
from .clear_weights import load_clear_weights
from .high_resolution import generate_cascade
from .inheritance import InheritanceReport, inherit_weights
from .io import load_pipeline, load_transformer, swap_transformer
from .models.autoencoder_pixel import PixelAutoencoder
from .models.transformer_clear_flux import ClearFluxTransformer2DModel
from .models.transformer_clear_sd3 import ClearSD3Transformer2DModel
from .models.transformer_dit import OfficialDiTTransformer2DModel
from .models.transformer_lit import LiTTransformer2DModel
from .models.transformer_lit_pixart import LiTPixArtTransformer2DModel

__all__ = [
    "ClearFluxTransformer2DModel",
    "ClearSD3Transformer2DModel",
    "InheritanceReport",
    "LiTPixArtTransformer2DModel",
    "LiTTransformer2DModel",
    "OfficialDiTTransformer2DModel",
    "PixelAutoencoder",
    "Stage",
    "assert_linear",
    "generate_cascade",
    "inherit_weights",
    "load_clear_weights",
    "load_pipeline",
    "load_transformer",
    "plan_stages",
    "swap_transformer",
]
