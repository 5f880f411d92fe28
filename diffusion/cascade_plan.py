"""What the stages of a high-resolution cascade do, and which of them a pipeline can run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from torch import nn

from .models.clear import ClearMixin

# Image tokens at the size that FLUX and SD3 were trained for, 1024 x 1024 pixels.
_TRAINING_TOKENS = 64 * 64
_NTK_FACTOR = 10.0
_EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")


@dataclass(frozen=True)
class Family:
    """What the pipelines of one model have in common.

    Args:
        name: for messages.
        text_to_image, image_to_image: the stock pipelines.
        guidance: of the first stage and of those after it.
        embeddings: names of the tensors that stand for a prompt.
        has_rotary: positions are rotary, so that NTK scaling means something.
    """

    name: str
    text_to_image: type[DiffusionPipeline]
    image_to_image: type[DiffusionPipeline]
    guidance: tuple[float, float]
    embeddings: tuple[str, ...]
    has_rotary: bool


FAMILIES = (
    # Guidance: the authors' notebook.
    Family("FLUX", FluxPipeline, FluxImg2ImgPipeline, (3.5, 7.5), _EMBEDDINGS, True),
    Family(
        "SD3",
        StableDiffusion3Pipeline,
        StableDiffusion3Img2ImgPipeline,
        (7.0, 7.0),
        (*_EMBEDDINGS, *(f"negative_{name}" for name in _EMBEDDINGS)),
        False,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One size of a cascade and how it is sampled.

    Args:
        height, width: pixels.
        num_inference_steps: of the whole schedule; image to image runs the last `strength` of it.
        guidance_scale: distilled guidance of FLUX, classifier-free guidance of SD3.
        strength: share of the schedule that a stage after the first runs on the enlarged image.
        shift: static shift s of the sigmas, ``s sigma / (1 + (s - 1) sigma)``; None keeps the
            pipeline's schedule. The notebook of CLEAR names a shift of 10 that current diffusers
            does not read; what it runs is 3, with a first sigma of .875 at strength .7.
        ntk_factor, proportional_scale: see `ClearFluxTransformer2DModel`; the teacher has neither.
        use_teacher: sample with the teacher instead of the pipeline's own transformer.
    """

    height: int
    width: int
    num_inference_steps: int = 20
    guidance_scale: float = 3.5
    strength: float = 0.7
    shift: float | None = 3.0
    ntk_factor: float = 1.0
    proportional_scale: bool = False
    use_teacher: bool = False

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The row of FAMILIES that `pipeline` belongs to.

    Raises:
        ValueError: neither FLUX nor SD3 text to image, or no autoencoder.
    """
    for family in FAMILIES:
        if isinstance(pipeline, family.text_to_image):
            if pipeline.vae is None:
                raise ValueError("`pipeline` must have a vae, got None")
            return family
    names = " or ".join(family.text_to_image.__name__ for family in FAMILIES)
    raise ValueError(f"`pipeline` must be a {names}, got a {type(pipeline).__name__}")


def _patch_pixels(pipeline: DiffusionPipeline) -> int:
    """Pixels a side of a token; FLUX packs 2 x 2 latents whatever its patch size says."""
    rotary = family_of(pipeline).has_rotary
    return pipeline.vae_scale_factor * (2 if rotary else pipeline.transformer.config.patch_size)


def _per_stage(name: str, values: Any, count: int) -> list[Any]:
    values = list(values) if isinstance(values, Sequence) else [values]
    if len(values) not in (1, count):
        raise ValueError(f"`{name}` must have one value or {count}, got {len(values)}")
    return values * count if len(values) == 1 else values


def plan_stages(
    pipeline: DiffusionPipeline,
    sizes: Sequence[tuple[int, int]],
    *,
    num_inference_steps: int | Sequence[int] = 20,
    guidance_scale: float | Sequence[float] | None = None,
    strength: float | Sequence[float] = 0.7,
    shift: float = 3.0,
    teacher_stages: int = 0,
) -> list[Stage]:
    """Stages with the published settings: NTK and proportional scale above the training size.

    Args:
        pipeline: that runs them.
        sizes: (height, width) of each, pixels.
        num_inference_steps, guidance_scale, strength: one value for all stages or one for each;
            guidance None is 3.5, then 7.5 for FLUX and 7 for SD3. The first strength counts only
            if the cascade starts from an image.
        shift: of the stages after the first, which keeps the schedule of the pipeline.
        teacher_stages: how many, from the first on, the teacher runs.

    Raises:
        ValueError: another number of values than of stages; what `family_of` refuses.
    """
    family, patch, count = family_of(pipeline), _patch_pixels(pipeline), len(sizes)
    if guidance_scale is None:
        guidance_scale = [family.guidance[min(index, 1)] for index in range(count)]
    steps = _per_stage("num_inference_steps", num_inference_steps, count)
    guidance = _per_stage("guidance_scale", guidance_scale, count)
    strengths = _per_stage("strength", strength, count)
    stages = []
    for index, (height, width) in enumerate(sizes):
        use_teacher = index < teacher_stages
        is_large = height * width > _TRAINING_TOKENS * patch**2
        is_scaled = is_large and not use_teacher and isinstance(pipeline.transformer, ClearMixin)
        stages.append(
            Stage(
                height=height,
                width=width,
                num_inference_steps=steps[index],
                guidance_scale=guidance[index],
                strength=strengths[index],
                shift=shift if index else None,
                ntk_factor=_NTK_FACTOR if is_scaled and family.has_rotary else 1.0,
                proportional_scale=is_scaled,
                use_teacher=use_teacher,
            )
        )
    return stages


def check_stages(
    pipeline: DiffusionPipeline, stages: Sequence[Stage], teacher: nn.Module | None
) -> None:
    """Raises ValueError for what would otherwise fail, or be resized, after hours."""
    if not stages:
        raise ValueError("`stages` must hold at least one, got none")
    for number, stage in enumerate(stages, 1):
        model = teacher if stage.use_teacher else pipeline.transformer
        where = f"of stage {number}"
        if model is None:
            raise ValueError(f"`teacher` must be given {where}, which uses it, got None")
        _check_size(pipeline, model, stage, where)
        _check_numbers(stage, where)
        is_scaled = stage.ntk_factor != 1 or stage.proportional_scale
        if is_scaled and not isinstance(model, ClearMixin):
            raise ValueError(
                f"`ntk_factor` and `proportional_scale` {where} must be 1 and False for a"
                f" {type(model).__name__}, got {stage.ntk_factor}, {stage.proportional_scale}"
            )
        if stage.shift is not None and "shift" not in pipeline.scheduler.config:
            name = type(pipeline.scheduler).__name__
            raise ValueError(f"`shift` {where} must be None for a {name}, got {stage.shift}")
    for number, (small, large) in enumerate(pairwise(stages), 2):
        if large.height <= small.height or large.width <= small.width:
            raise ValueError(f"`stages` must grow, got {small}, then {large} in stage {number}")


def _check_size(pipeline: Any, model: Any, stage: Stage, where: str) -> None:
    patch = _patch_pixels(pipeline)
    multiple = patch * (model.config.get("down_factor") or 1)
    for name in ("height", "width"):
        side = getattr(stage, name)
        if side < 1 or side % multiple:
            raise ValueError(
                f"`{name}` {where} must be a positive multiple of {multiple}, got {side}"
            )
        longest = model.config.get("pos_embed_max_size")
        if longest is not None and side > longest * patch:
            raise ValueError(
                f"`{name}` {where} must be at most {longest * patch}, where the position table of"
                f" the model ends, got {side}"
            )


def _check_numbers(stage: Stage, where: str) -> None:
    if stage.num_inference_steps < 1:
        got = stage.num_inference_steps
        raise ValueError(f"`num_inference_steps` {where} must be at least 1, got {got}")
    if not 0 < stage.strength <= 1:
        raise ValueError(f"`strength` {where} must be in (0, 1], got {stage.strength}")
    if stage.shift is not None and not stage.shift > 0:
        raise ValueError(f"`shift` {where} must be positive or None, got {stage.shift}")
