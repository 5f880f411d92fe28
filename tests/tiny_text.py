"""Small real text-to-image pipelines with tokenizers and text encoders, and captioned images."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lintra.diffusion.training.captions import read_captions
from lintra.diffusion.training.prompt_cache_build import build_prompt_cache, pipeline_encoders
from lintra.diffusion.training.text_pipelines import open_encoders
from tiny_clear import FLUX, SD3, tiny_stock
from tiny_models import tiny_vae
from tiny_pixart import tiny_pixart

CAPTIONS = ["a red cube", "two cats", "the sea", "a tall tree", "rain", "a wide road", "snow"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_T5_WIDTH = 12
_SPACE = chr(0x2581)  # sentencepiece's mark of a word


def _clip_tokenizer() -> CLIPTokenizer:
    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    vocabulary |= {word: number for number, word in enumerate(words, start=2)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def _t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", _SPACE, *_LETTERS]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def _clip(width: int, projected: bool = False) -> Any:
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
    )
    return cls(config).eval()


def _t5() -> T5EncoderModel:
    config = T5Config(vocab_size=32, d_model=_T5_WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def tiny_text_pipeline(family: str, seed: int = 0) -> Any:
    """`flux`, `sd3` or `pixart`; latents of 4 channels, half the sides of the images."""
    torch.manual_seed(seed)
    t5 = {"flux": "_2", "sd3": "_3", "pixart": ""}[family]
    vae = tiny_vae(shift_factor=0.1)
    common = {f"text_encoder{t5}": _t5(), f"tokenizer{t5}": _t5_tokenizer(), "vae": vae}
    if family == "pixart":
        pipeline = PixArtSigmaPipeline(
            transformer=tiny_pixart(),
            scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02),
            **common,
        )
    elif family == "flux":
        pipeline = FluxPipeline(
            transformer=tiny_stock("flux", joint_attention_dim=_T5_WIDTH),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            text_encoder=_clip(FLUX["pooled_projection_dim"]),
            tokenizer=_clip_tokenizer(),
            **common,
        )
    else:
        half = SD3["pooled_projection_dim"] // 2
        pipeline = StableDiffusion3Pipeline(
            transformer=tiny_stock("sd3", joint_attention_dim=_T5_WIDTH),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=_clip(half, projected=True),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(half, projected=True),
            tokenizer_2=_clip_tokenizer(),
            **common,
        )
        pipeline.tokenizer_max_length = 16
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def captioned_folder(
    folder: Path, sizes: tuple[tuple[int, int], ...] = ((18, 18), (12, 24))
) -> Path:
    """Seven images of alternating (height, width) with a text file each."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number, caption in enumerate(CAPTIONS):
        height, width = (12, 24) if number % 2 else (18, 18)
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption + "\n")
    return folder


def make_tiny_cache(folder: Path, pipeline_folder: Path, **changes: Any) -> Path:
    """A cache of the captioned images for a tiny pipeline, in two buckets of 7 images in all."""
    images = read_captions(captioned_folder(folder.with_name(f"{folder.name}_images")))
    pipeline = open_encoders(pipeline_folder, dtype=torch.float32)
    options: dict[str, Any] = {"buckets": [(8, 16), (16, 16)], **changes}
    build_prompt_cache(pipeline_encoders(pipeline, pipeline_folder, 8), folder, images, **options)
    return folder


def make_places(folder: Path, *families: str) -> dict[str, tuple[Path, Path]]:
    """Pipeline folder and cache of each family."""
    places = {}
    for family in families:
        pipeline = folder / family / "pipeline"
        tiny_text_pipeline(family).save_pretrained(pipeline)
        places[family] = pipeline, make_tiny_cache(folder / family / "cache", pipeline)
    return places
