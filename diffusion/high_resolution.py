"""Images far above the training size: a cascade of SDEdit stages, each on the enlarged last one.

As in CLEAR (Liu et al. 2024, arXiv:2412.16112), after SDEdit (Meng et al. 2022, arXiv:2108.01073):
an image of the training size is enlarged, noised part of the way and denoised at the new size.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from .cascade_plan import Family, Stage, check_stages, family_of
from .models.clear import ClearMixin

Prompt = str | Mapping[str, Tensor]
# Entry of a PNG's text that holds what the image was made with.
_RECORD = "lintra"


def encode_prompt(
    pipeline: DiffusionPipeline, prompt: str, negative_prompt: str | None = None
) -> dict[str, Tensor]:
    """The embeddings of a prompt, made once for all stages.

    Args:
        pipeline: FLUX or SD3, with its text encoders.
        prompt: of one image.
        negative_prompt: what guidance leads away from; FLUX has none here.

    Raises:
        ValueError: no text encoders; a negative prompt for FLUX; what `family_of` refuses.
    """
    family = family_of(pipeline)
    if getattr(pipeline, "text_encoder", None) is None:
        raise ValueError("`pipeline` must have text encoders to read a prompt, got None")
    if family.has_rotary:
        if negative_prompt is not None:
            raise ValueError(
                f"`negative_prompt` must be None for {family.name}, got {negative_prompt!r}"
            )
        embeds, pooled, _ = pipeline.encode_prompt(prompt=prompt, prompt_2=None)
        return dict(zip(family.embeddings, (embeds, pooled), strict=True))
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompt=prompt, prompt_2=None, prompt_3=None, negative_prompt=negative_prompt
    )
    values = (embeds, pooled, negative, negative_pooled)
    return dict(zip(family.embeddings, values, strict=True))


@contextmanager
def _offloaded(pipeline: Any, device: torch.device | str | None) -> Iterator[None]:
    """Models wait on the CPU and visit `device` when their turn comes; None: as they are."""
    if device is None:
        yield
        return
    pipeline.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        pipeline.remove_all_hooks()


def _embeddings(
    pipeline: Any,
    family: Family,
    prompt: Prompt,
    negative_prompt: str | None,
    offload_device: torch.device | str | None,
) -> dict[str, Tensor]:
    if isinstance(prompt, str):
        with torch.no_grad(), _offloaded(pipeline, offload_device):
            prompt = encode_prompt(pipeline, prompt, negative_prompt)
    elif negative_prompt is not None:
        raise ValueError("`negative_prompt` must be None where the prompt is tensors, got a text")
    if set(prompt) != set(family.embeddings):
        raise ValueError(
            f"`prompt` must be text or the tensors {', '.join(family.embeddings)}, got"
            f" {', '.join(sorted(prompt)) or 'none'}"
        )
    if (batches := {tensor.shape[0] for tensor in prompt.values()}) != {1}:
        raise ValueError(f"`prompt` must be that of one image, got batches of {sorted(batches)}")
    return {name: prompt[name] for name in family.embeddings}


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()


def _model_digest(model: Any) -> str:
    """Of the configuration and of a few numbers of every parameter."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    parameters = (_tensor_bytes(p.flatten()[:8]) for p in model.parameters())
    return _digest(json.dumps(config, sort_keys=True, default=str).encode(), *parameters)


def _records(
    stages: Sequence[Stage],
    models: Sequence[Any],
    embeddings: Sequence[Tensor],
    image: Image.Image | None,
    seed: int,
) -> list[str]:
    """For each stage, what its image depends on: with this the next call knows it again."""
    source = {
        "prompt": _digest(*map(_tensor_bytes, embeddings)),
        "image": None if image is None else _digest(image.convert("RGB").tobytes()),
        "seed": seed,
    }
    digests = {id(model): _model_digest(model) for model in models}
    made = [
        {**asdict(stage), "model": digests[id(model)]}
        for stage, model in zip(stages, models, strict=True)
    ]
    return [
        json.dumps({**source, "stages": made[:count]}, sort_keys=True)
        for count in range(1, len(made) + 1)
    ]


def _stage_pipeline(pipeline: Any, transformer: Any, stage: Stage, from_image: bool) -> Any:
    family = family_of(pipeline)
    cls = family.image_to_image if from_image else family.text_to_image
    # diffusers' from_pipe accepts components of exactly the annotated classes only.
    wanted = set(inspect.signature(cls.__init__).parameters)
    components = {name: part for name, part in pipeline.components.items() if name in wanted}
    changes = {} if stage.shift is None else {"use_dynamic_shifting": False, "shift": stage.shift}
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    return cls(**{**components, "transformer": transformer, "scheduler": scheduler})


def _run_stage(
    run: Any,
    stage: Stage,
    embeddings: Mapping[str, Tensor],
    image: Image.Image | None,
    seed: int,
    offload_device: torch.device | str | None,
) -> Image.Image:
    call: dict[str, Any] = dict(embeddings)
    if image is not None:
        size = (stage.width, stage.height)
        call["image"] = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        call["strength"] = stage.strength
    if isinstance(run.transformer, ClearMixin):
        names = ("ntk_factor", "proportional_scale")
        call["joint_attention_kwargs"] = {name: getattr(stage, name) for name in names}
    with torch.no_grad(), _offloaded(run, offload_device):
        return run(
            **call,
            height=stage.height,
            width=stage.width,
            num_inference_steps=stage.num_inference_steps,
            guidance_scale=stage.guidance_scale,
            # On the CPU, where the same seed gives the same noise on every machine.
            generator=torch.Generator().manual_seed(seed),
            output_type="pil",
        ).images[0]


def _read_record(file: Path) -> str | None:
    try:
        with Image.open(file) as image:
            return getattr(image, "text", {}).get(_RECORD)
    except OSError as error:
        raise ValueError(f"`output_dir` must hold whole images, got {file}: {error}") from error


def _save(image: Image.Image, file: Path, record: str) -> None:
    info = PngInfo()
    info.add_text(_RECORD, record)
    partial = file.with_suffix(".partial")
    image.save(partial, format="PNG", pnginfo=info)
    partial.replace(file)


def _finished(files: Sequence[Path], records: Sequence[str]) -> int:
    """How many stages an earlier run of the same cascade has written.

    Raises:
        ValueError: a file of another run, which would be lost.
    """
    for file, record in zip(files, records, strict=True):
        if file.exists() and _read_record(file) != record:
            raise ValueError(
                f"`output_dir` must hold images of this cascade only, got {file} of another prompt,"
                " seed, model or settings: name another folder or move the file"
            )
    done = [file.exists() for file in files]
    return done.index(False) if False in done else len(done)


def generate_cascade(
    pipeline: DiffusionPipeline,
    prompt: Prompt,
    stages: Sequence[Stage],
    *,
    negative_prompt: str | None = None,
    teacher: nn.Module | None = None,
    image: Image.Image | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
    vae_tiling: bool = True,
    offload_device: torch.device | str | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Image.Image]:
    """One image at growing sizes, each stage from the enlarged (Lanczos) image of the last.

    Args:
        pipeline: `FluxPipeline` or `StableDiffusion3Pipeline`, on its device; is left as it was.
        prompt: text, or its embeddings by the names of the pipeline's arguments, batch 1 (for
            SD3 with the negative ones).
        negative_prompt: see `encode_prompt`; belongs to a text.
        stages: see `plan_stages`; without `image` the first is text to image.
        teacher: transformer of the stages that ask for it. One from which the pipeline's own was
            made by `from_teacher` shares its weights and takes no memory.
        image: to start from.
        seed: stage i draws its noise from seed + i.
        output_dir: each image is written there before the next stage starts, with what it was made
            of; a second call takes up where the first was stopped.
        vae_tiling: encode and decode images above the autoencoder's own size tile by tile.
        offload_device: keeps models on the CPU and moves each to this device when its turn comes.
            Moving separates weights that two transformers share: on the CPU there are two then.
        say: takes a line about each stage.

    Returns:
        The image of each stage.

    Raises:
        ValueError: stages that do not grow, a side that patches or pooling do not divide, strengths
            out of (0, 1], another pipeline, and what the classes named above refuse, before
            anything is sampled; an `output_dir` with images of another cascade.
    """
    family = family_of(pipeline)
    check_stages(pipeline, stages, teacher)
    say = say or (lambda line: None)
    embeddings = _embeddings(pipeline, family, prompt, negative_prompt, offload_device)
    models = [teacher if stage.use_teacher else pipeline.transformer for stage in stages]
    files: list[Path] = []
    records: list[str] = []
    images: list[Image.Image] = []
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"stage{n}_{stage}.png" for n, stage in enumerate(stages, 1)]
        records = _records(stages, models, list(embeddings.values()), image, seed)
        for file in files[: _finished(files, records)]:
            with Image.open(file) as saved:
                images.append(saved.convert("RGB"))
            say(f"{file}: taken from an earlier run")

    was_tiled = getattr(pipeline.vae, "use_tiling", False)
    if vae_tiling:
        pipeline.vae.enable_tiling()
    try:
        for index in range(len(images), len(stages)):
            title = f"stage {index + 1} of {len(stages)}, {stages[index]}"
            say(f"{title}: {type(models[index]).__name__}")
            run = _stage_pipeline(pipeline, models[index], stages[index], bool(images or image))
            run.set_progress_bar_config(
                **{"desc": title, **getattr(pipeline, "_progress_bar_config", {})}
            )
            last = images[-1] if images else image
            images.append(
                _run_stage(run, stages[index], embeddings, last, seed + index, offload_device)
            )
            if files:
                _save(images[-1], files[index], records[index])
                say(f"{files[index]}: written")
    finally:
        if vae_tiling and not was_tiled:
            pipeline.vae.disable_tiling()
    return images
