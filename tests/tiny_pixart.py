"""Small real PixArt models and their inputs."""

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from lintra.diffusion import LiTPixArtTransformer2DModel
from tiny_models import randomize, tiny_vae

TINY_PIXART = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "caption_channels": 12,
    "sample_size": 8,
    "use_additional_conditions": False,
}


def tiny_pixart(**changes: object) -> PixArtTransformer2DModel:
    return randomize(PixArtTransformer2DModel(**{**TINY_PIXART, **changes})).eval()


def tiny_lit_pixart(**changes: object) -> LiTPixArtTransformer2DModel:
    return randomize(LiTPixArtTransformer2DModel(**{**TINY_PIXART, **changes})).eval()


def prompt_inputs(
    height: int = 8, width: int = 8, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Two latents with prompts of 5 tokens, of which the second has 3."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, height, width, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator).to(dtype),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([7, 650]),
    }


def sigma_pipeline(transformer: PixArtTransformer2DModel) -> PixArtSigmaPipeline:
    """Without text encoder: prompts are given as embeddings."""
    pipeline = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sigma_images(pipeline: PixArtSigmaPipeline, height: int = 16, width: int = 16) -> torch.Tensor:
    prompt = prompt_inputs()
    return pipeline(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=prompt["encoder_hidden_states"],
        prompt_attention_mask=prompt["encoder_attention_mask"],
        negative_prompt_embeds=torch.zeros(2, 5, 12),
        negative_prompt_attention_mask=torch.ones(2, 5, dtype=torch.long),
        height=height,
        width=width,
        use_resolution_binning=False,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
