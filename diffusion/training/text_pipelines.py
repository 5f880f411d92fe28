"""What differs between text-to-image pipelines where prompts are encoded and latents drawn."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..io import load_pipeline

# Bytes at both ends of a tensor that count for a fingerprint.
_SAMPLED_BYTES = 2048


def _encode_flux(pipeline: Any, prompts: list[str], length: int) -> dict[str, Tensor]:
    embeds, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=length)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _encode_sd3(pipeline: Any, prompts: list[str], length: int) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _encode_pixart(pipeline: Any, prompts: list[str], length: int) -> dict[str, Tensor]:
    embeds, mask, *_ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask.bool()}


@dataclass(frozen=True)
class TextPipeline:
    """One kind of text-to-image pipeline.

    Attributes:
        pipelines: its classes.
        text_encoders, tokenizers: names of components.
        max_sequence_length: tokens of a prompt unless told otherwise.
        encode: pipeline, prompts and tokens -> embeddings, each with a row a prompt.
        has_negative_prompt: guidance compares with a second, empty prompt, so that training
            drops prompts; FLUX has it as an input of the model instead.
    """

    pipelines: tuple[type[DiffusionPipeline], ...]
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    max_sequence_length: int
    encode: Callable[[Any, list[str], int], dict[str, Tensor]]
    has_negative_prompt: bool

    @property
    def text_components(self) -> tuple[str, ...]:
        return (*self.text_encoders, *self.tokenizers)


TEXT_PIPELINES: dict[str, TextPipeline] = {
    "flux": TextPipeline(
        (FluxPipeline,),
        ("text_encoder", "text_encoder_2"),
        ("tokenizer", "tokenizer_2"),
        512,
        _encode_flux,
        has_negative_prompt=False,
    ),
    "sd3": TextPipeline(
        (StableDiffusion3Pipeline,),
        ("text_encoder", "text_encoder_2", "text_encoder_3"),
        ("tokenizer", "tokenizer_2", "tokenizer_3"),
        256,
        _encode_sd3,
        has_negative_prompt=True,
    ),
    "pixart": TextPipeline(
        (PixArtSigmaPipeline, PixArtAlphaPipeline),
        ("text_encoder",),
        ("tokenizer",),
        300,
        _encode_pixart,
        has_negative_prompt=True,
    ),
}


def text_family(pipeline: DiffusionPipeline) -> str:
    """The key of `TEXT_PIPELINES` that a pipeline is of.

    Raises:
        ValueError: another pipeline.
    """
    for name, kind in TEXT_PIPELINES.items():
        if isinstance(pipeline, kind.pipelines):
            return name
    known = ", ".join(cls.__name__ for kind in TEXT_PIPELINES.values() for cls in kind.pipelines)
    raise ValueError(f"`pipeline` must be one of {known}, got a {type(pipeline).__name__}")


def open_encoders(
    folder: str | Path, *, dtype: torch.dtype, with_transformer: bool = False
) -> DiffusionPipeline:
    """A pipeline for `make-cache`: its VAE in float32, and no transformer unless it is to draw.

    Raises:
        ValueError: another pipeline, or one without VAE or a text encoder.
        FileNotFoundError: as of `load_pipeline`.
    """
    absent = {} if with_transformer else {"transformer": None}
    pipeline = load_pipeline(folder, dtype=dtype, **absent)
    kind = TEXT_PIPELINES[text_family(pipeline)]
    # SD3 runs without T5, as upstream documents; nothing else may be absent.
    optional = {"text_encoder_3", "tokenizer_3"}
    for name in ("vae", *kind.text_components):
        if getattr(pipeline, name) is None and name not in optional:
            raise ValueError(f"`pipeline` must have a {name}, got None in {folder}")
    # Latents are made in float32: some VAEs overflow in half precision, and training checks the
    # cache against the VAE's weights as they are in float32.
    vae = type(pipeline.vae).from_pretrained(Path(folder) / "vae")
    pipeline.register_modules(vae=vae.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoder_fingerprints(folder: str | Path, family: str) -> dict[str, str]:
    """Text encoder -> `folder_fingerprint` of its weights, for those that the pipeline has."""
    names = TEXT_PIPELINES[family].text_encoders
    folders = {name: Path(folder) / name for name in names}
    return {name: folder_fingerprint(path) for name, path in folders.items() if path.is_dir()}


def folder_fingerprint(folder: Path) -> str:
    """First 16 hex digits of a SHA-256 over the weights of a model folder.

    Names, dtypes, shapes and the first and last bytes of every tensor: a text encoder of many
    gigabytes is told from another in a second, however its files are split.

    Raises:
        ValueError: no safetensors in the folder, or a damaged file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"`folder` must hold safetensors weights, got {folder} with none")
    lines = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (no mapping)
                    lines.append(_describe(name, handle.get_slice(name)))
        except SafetensorError as error:
            raise ValueError(f"{file} must be whole safetensors, got {error}") from error
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line)
    return digest.hexdigest()[:16]


def _describe(name: str, tensor: Any) -> bytes:
    shape = tensor.get_shape()
    head = f"{name} {tensor.get_dtype()} {shape} ".encode()
    if not shape or 0 in shape:
        return head
    first, last = (
        row.contiguous().reshape(-1).view(torch.uint8).numpy()
        for row in (tensor[0:1], tensor[shape[0] - 1 : shape[0]])
    )
    return head + first[:_SAMPLED_BYTES].tobytes() + last[-_SAMPLED_BYTES:].tobytes()


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], max_sequence_length: int
) -> dict[str, Tensor]:
    """Embeddings of prompts on the CPU, in the text encoders' dtype, each with a row a prompt."""
    kind = TEXT_PIPELINES[text_family(pipeline)]
    encoded = kind.encode(pipeline, list(prompts), max_sequence_length)
    return {name: tensor.cpu() for name, tensor in encoded.items()}


@torch.no_grad()
def draw_latents(
    pipeline: DiffusionPipeline,
    embeddings: dict[str, Tensor],
    empty: dict[str, Tensor],
    size: tuple[int, int],
    *,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    true_cfg_scale: float = 1.0,
) -> Tensor:
    """Latents x_0 ``(B, c, h, w)`` float32 that the pipeline draws, as its model sees them.

    Args:
        pipeline: with its transformer.
        embeddings: of the prompts, from `encode_prompts`.
        empty: embeddings of the empty prompt, a row each; the negative prompt of guidance.
        size: height and width in pixels.
        seeds: of each image.
        true_cfg_scale: of FLUX, guidance by a second call with the empty prompt; 1 is none.
    """
    family = text_family(pipeline)
    device, dtype = pipeline.transformer.device, pipeline.transformer.dtype
    inputs: dict[str, Any] = {name: _to(value, device, dtype) for name, value in embeddings.items()}
    has_negative = TEXT_PIPELINES[family].has_negative_prompt
    if family == "flux":
        inputs["true_cfg_scale"] = true_cfg_scale
        has_negative = true_cfg_scale > 1
    if has_negative:
        repeat = len(seeds)
        inputs |= {
            f"negative_{name}": _to(value.expand(repeat, *value.shape[1:]), device, dtype)
            for name, value in empty.items()
        }
        if family == "pixart":
            inputs |= {"negative_prompt": None, "use_resolution_binning": False}
    height, width = size
    latents = pipeline(
        **inputs,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    if family == "flux":
        latents = FluxPipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    return latents.float().cpu()


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """uint8 images ``(B, 3, H, W)`` on the CPU of latents as a model sees them."""
    scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    pixels = vae.decode(scaled + (getattr(vae.config, "shift_factor", None) or 0.0)).sample
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def _to(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return value.to(device, dtype if value.is_floating_point() else None)


def vae_reduction(vae: AutoencoderKL) -> int:
    """Pixels of a latent's side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
