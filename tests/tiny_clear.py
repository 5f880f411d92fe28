"""Small FLUX and SD3 models, stock and with local attention, and a dense oracle for both."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lintra.diffusion import ClearFluxTransformer2DModel, ClearSD3Transformer2DModel
from tiny_models import tiny_vae

FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 24,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
STOCK = {"flux": (FluxTransformer2DModel, FLUX), "sd3": (SD3Transformer2DModel, SD3)}
CLEAR = {"flux": ClearFluxTransformer2DModel, "sd3": ClearSD3Transformer2DModel}
NUM_LAYERS = {"flux": 4, "sd3": 3}


def tiny_stock(family: str, **changes: Any) -> Any:
    """Every parameter drawn, large enough for sharp attention and open gates."""
    cls, config = STOCK[family]
    model = cls(**{**config, **changes}).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = math.prod(parameter.shape[1:])
        mean = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        with torch.no_grad():
            parameter.copy_(mean + noise * (0.1 if parameter.ndim == 1 else fan_in**-0.5))
    return model


def tiny_clear(family: str, radius: float = 4, **changes: Any) -> Any:
    """The stock model's weights; pooling kernels, if any, that are no mean."""
    model = CLEAR[family](**{**STOCK[family][1], "radius": radius, **changes}).eval()
    stock = {k: v for k, v in changes.items() if k in STOCK[family][1]}
    model.load_state_dict(tiny_stock(family, **stock).state_dict())
    for number, weight in enumerate(pooling_weights(model)):
        torch.manual_seed(number)
        torch.nn.init.normal_(weight, mean=1 / weight.numel(), std=0.3)
    return model


def pooling_weights(model: Any) -> list[torch.nn.Parameter]:
    named = model.named_parameters()
    return [weight for name, weight in named if name.endswith("processor.spatial_weight")]


def flux_ids(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", dtype)


def clear_inputs(
    family: str,
    grid: tuple[int, int] = (9, 12),
    batch: int = 2,
    num_text: int = 5,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    height, width = grid
    common = {
        "encoder_hidden_states": draw(batch, num_text, 12),
        "pooled_projections": draw(batch, 8),
        "timestep": torch.linspace(0.3, 0.8, batch).to(dtype),
    }
    if family == "sd3":
        return {"hidden_states": draw(batch, 4, 2 * height, 2 * width), **common}
    return {
        "hidden_states": draw(batch, height * width, 16),
        **common,
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
        "img_ids": flux_ids(height, width, dtype),
        "txt_ids": torch.zeros(num_text, 3, dtype=dtype),
    }


def disc_mask(grid: tuple[int, int], radius: float, num_text: int) -> Tensor:
    """``(T + h * w, T + h * w)``, text first, True where the query (row) sees the key."""
    height, width = grid
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([y, x], dim=-1).flatten(0, 1).double()
    mask = torch.ones(num_text + height * width, num_text + height * width, dtype=torch.bool)
    mask[num_text:, num_text:] = torch.cdist(places, places) < radius - 1e-9
    return mask


class DenseOracle(TorchFunctionMode):
    """Makes the softmax attention of a stock model that of CLEAR, with a mask over all pairs."""

    def __init__(
        self,
        family: str,
        grid: tuple[int, int],
        radius: float,
        weights: list[Tensor] | None = None,
        proportional: bool = False,
    ):
        super().__init__()
        self.text_first = family == "flux"
        self.grid, self.radius, self.proportional = grid, radius, proportional
        self.weights: Iterator[Tensor] | None = iter(weights) if weights else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, key, value = (named[name] for name in ("query", "key", "value"))
        height, width = self.grid
        num_text = query.shape[2] - height * width
        scale = None
        if self.proportional:
            count = query.shape[2] * (10 if self.weights is not None else 1)
            scale = math.sqrt(math.log(count) / math.log(4608) / query.shape[3])
        mask = disc_mask(self.grid, self.radius, num_text)
        image = slice(num_text, None) if self.text_first else slice(0, height * width)
        if not self.text_first:
            mask = mask.roll((-num_text, -num_text), (0, 1))
        if self.weights is not None:
            weight = next(self.weights)
            factor = weight.shape[3]
            is_image = torch.zeros(len(mask), 1, dtype=torch.bool)
            is_image[image] = True
            pooled = height // factor * (width // factor)
            mask = torch.cat([mask, is_image.expand(-1, pooled)], dim=1)
            key, value = (
                torch.cat([x, self._pool(x[:, :, image], weight)], dim=2) for x in (key, value)
            )
        return func(query, key, value, attn_mask=mask, scale=scale)

    def _pool(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """(B, H, h * w, D), by a strided convolution of every channel."""
        images = tokens.transpose(2, 3).flatten(0, 2).unflatten(-1, self.grid)[:, None]
        factor = weight.shape[3]
        pooled = F.conv2d(images, weight.reshape(1, 1, factor, factor), stride=factor)
        return pooled.flatten(1).unflatten(0, tokens.mT.shape[:3]).mT


def tiny_clear_pipeline(family: str, transformer: Any) -> Any:
    torch.manual_seed(0)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    vae = tiny_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    common = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae, **nothing}
    if family == "flux":
        pipeline = FluxPipeline(transformer=transformer, **common)
    else:
        more = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
        pipeline = StableDiffusion3Pipeline(transformer=transformer, **common, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt_embeddings(family: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    embeds = {
        "prompt_embeds": torch.randn(1, 7, 12, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=generator),
    }
    if family == "flux":
        return embeds
    return embeds | {f"negative_{name}": -value for name, value in embeds.items()}


def sample(family: str, pipeline: Any, **changes: Any) -> Tensor:
    """One image ``(1, H, W, 3)`` of 40 x 24 pixels in two steps."""
    arguments = {
        **prompt_embeddings(family),
        "height": 40,
        "width": 24,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
    }
    return pipeline(**{**arguments, **changes}).images
