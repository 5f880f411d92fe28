"""Small real models for the diffusion tests."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from lintra.diffusion import LiTTransformer2DModel, PixelAutoencoder

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 1000,
}


class Nothing(torch.nn.Module):
    """In the place of attention: with it gone, a linear model is its donor."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every parameter anew: zero-initialised gates and biases would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_dit(**changes: object) -> DiTTransformer2DModel:
    return randomize(DiTTransformer2DModel(**{**TINY, **changes})).eval()


def tiny_lit(**changes: object) -> LiTTransformer2DModel:
    return randomize(LiTTransformer2DModel(**{**TINY, **changes})).eval()


def tiny_vae(**changes: object) -> AutoencoderKL:
    """Halves the sides of RGB images, 16 x 16 by default; latents of 4 channels."""
    config = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


def tiny_pipeline(transformer: torch.nn.Module, vae: torch.nn.Module | None = None) -> DiTPipeline:
    pipeline = DiTPipeline(transformer, vae or tiny_vae(), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixel_pipeline(transformer: torch.nn.Module) -> DiTPipeline:
    channels = transformer.config.in_channels
    return tiny_pipeline(transformer, PixelAutoencoder(in_channels=channels))


def inputs(
    height: int = 8, width: int = 8, batch: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator).to(dtype),
        "timestep": torch.tensor([7, 650])[:batch],
        "class_labels": torch.tensor([3, 1000])[:batch],
    }
