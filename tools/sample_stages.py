"""The half of `lintra sample` that makes one image of FLUX or SD3 at growing sizes."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from lintra.diffusion.cascade_plan import plan_stages
from lintra.diffusion.clear_weights import load_clear_weights, official_variant
from lintra.diffusion.high_resolution import generate_cascade
from lintra.diffusion.io import load_pipeline, load_transformer, swap_transformer
from lintra.diffusion.models.transformer_clear_flux import ClearFluxTransformer2DModel
from lintra.diffusion.models.transformer_clear_sd3 import ClearSD3Transformer2DModel

_CLEAR = {
    "FluxTransformer2DModel": ClearFluxTransformer2DModel,
    "SD3Transformer2DModel": ClearSD3Transformer2DModel,
}


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from ``1024`` or ``768x1024``, height first."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise ValueError(f"`stages` must be sizes like 1024 or 768x1024, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _local(pipeline: Any, options: Namespace) -> Any:
    """A local transformer on the weights of the pipeline's stock one."""
    stock = pipeline.transformer
    cls = _CLEAR.get(type(stock).__name__)
    if cls is None:
        raise ValueError(
            f"`--radius` and `--clear` must be given for a stock transformer, got a"
            f" {type(stock).__name__}"
        )
    named = official_variant(options.clear) if options.clear else None
    radius, down_factor = named or (options.radius, None)
    if options.radius not in (None, radius):
        raise ValueError(f"`--radius` must be that of the weights, {radius}, got {options.radius}")
    if radius is None:
        raise ValueError(f"`--radius` must be given for {options.clear}, got none")
    student = cls.from_teacher(stock, radius=radius, down_factor=down_factor)
    if options.clear:
        load_clear_weights(student, options.clear)
    return student


def _prompt(pipeline: Any, options: Namespace) -> Any:
    if options.prompt is None:
        raise ValueError("`--prompt` must be given with --stages, got none")
    if not options.prompt.endswith(".safetensors"):
        return options.prompt
    try:
        embeddings = load_file(options.prompt)
    except SafetensorError as error:
        raise ValueError(
            f"`--prompt` must be a whole file, got {options.prompt}: {error}"
        ) from error
    model = pipeline.transformer
    return {name: value.to(model.device, model.dtype) for name, value in embeddings.items()}


def _image(file: str | None) -> Image.Image | None:
    if file is None:
        return None
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"`--image` must be a picture, got {file}: {error}") from error


def sample_stages(options: Namespace, device: str, dtype: torch.dtype) -> str:
    """Runs the cascade and returns the line to print."""
    sizes = [parse_size(text) for text in options.stages]
    pipeline = load_pipeline(Path(options.pipeline).absolute(), dtype=dtype)
    # Offloading starts from the CPU.
    place = "cpu" if options.offload else device
    pipeline.to(place)
    teacher = None
    if options.radius is not None or options.clear is not None:
        teacher = pipeline.transformer
        swap_transformer(pipeline, _local(pipeline, options))
    if options.teacher is not None:
        teacher = load_transformer(options.teacher, dtype=dtype).to(place)
    count = options.teacher_stages
    if count is None:
        count = 0 if teacher is None else 1
    given: dict[str, Any] = {
        name: _values(getattr(options, name))
        for name in ("num_inference_steps", "guidance_scale", "strength")
        if getattr(options, name) is not None
    }
    stages = plan_stages(pipeline, sizes, shift=options.shift, teacher_stages=count, **given)
    output = options.output or "cascade"
    images = generate_cascade(
        pipeline,
        _prompt(pipeline, options),
        stages,
        teacher=teacher,
        image=_image(options.image),
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        output_dir=output,
        vae_tiling=not options.no_vae_tiling,
        offload_device=device if options.offload else None,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    width, height = images[-1].size
    return f"{len(images)} images up to {width} x {height} px: {output}"


def _values(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else values
