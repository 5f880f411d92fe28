"""Teacher, student and pipeline of a text-to-image run."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.modeling_utils import ModelMixin

from ..flow import FlowProcess
from ..inheritance import student_config
from ..initialization import initialize_mmdit
from ..io import load_pipeline
from ..losses import check_loss_weights, needs_teacher
from ..models.autoencoder_pixel import PixelAutoencoder
from ..models.transformer_clear_flux import ClearFluxTransformer2DModel
from ..models.transformer_clear_sd3 import ClearSD3Transformer2DModel
from ..models.transformer_lit_pixart import LiTPixArtTransformer2DModel
from .assemble import Models, check_noise_schedule
from .config import Recipe
from .families import Family, FluxFamily, PixArtFamily, SD3Family
from .text_pipelines import TEXT_PIPELINES, text_family, vae_reduction
from .trainable import choose_trainable, start_from

TEXT_STUDENTS: dict[str, type[ModelMixin]] = {
    "flux": FluxTransformer2DModel,
    "clear_flux": ClearFluxTransformer2DModel,
    "sd3": SD3Transformer2DModel,
    "clear_sd3": ClearSD3Transformer2DModel,
    "pixart": PixArtTransformer2DModel,
    "lit_pixart": LiTPixArtTransformer2DModel,
}


def open_teacher(recipe: Recipe, dtype: torch.dtype) -> DiffusionPipeline | None:
    """The teacher's pipeline without text encoders, which the cache makes needless.

    Raises:
        ValueError: a pipeline of another family, one without transformer or VAE, or another noise
            schedule. FileNotFoundError: as of `load_pipeline`.
    """
    source, family = recipe.model.pretrained_teacher_model, recipe.model.family
    if source is None:
        return None
    kind = TEXT_PIPELINES[family]
    pipeline = load_pipeline(source, dtype=dtype, **dict.fromkeys(kind.text_components))
    if not isinstance(pipeline, kind.pipelines):
        names = " or ".join(cls.__name__ for cls in kind.pipelines)
        raise ValueError(
            f"`model.pretrained_teacher_model` must be a {names}, got a {type(pipeline).__name__}"
        )
    if pipeline.transformer is None:
        raise ValueError(
            f"`model.pretrained_teacher_model` must have a transformer, got none in {source}"
        )
    if recipe.model.process == "ddpm":
        check_noise_schedule(recipe.noise, pipeline)
    return pipeline


def _build_student(recipe: Recipe, teacher: ModelMixin | None) -> ModelMixin:
    model, cls = recipe.model, TEXT_STUDENTS[recipe.model.kind]
    if teacher is None:
        student = cls(**student_config(cls, None, model.config))
        if model.process == "flow":
            initialize_mmdit(student)
        return student
    if model.is_clear:
        return cls.from_teacher(teacher, **model.config)
    if model.kind == "lit_pixart" and model.inherit != "none":
        return cls.from_teacher(teacher, model.inherit, **model.config)
    if model.kind == "lit_pixart":
        extra = {"use_additional_conditions": teacher.use_additional_conditions}
        return cls(**student_config(cls, teacher, {**extra, **model.config}))
    if model.config:
        raise ValueError(
            f"`model.config` must be empty for a {model.kind} that goes on from its teacher, got"
            f" {model.config}"
        )
    if type(teacher) is not cls:
        raise ValueError(
            f"`model.pretrained_teacher_model` must hold a {cls.__name__}, got a"
            f" {type(teacher).__name__}"
        )
    return copy.deepcopy(teacher)


def build_text_models(
    recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> tuple[Models, DiffusionPipeline]:
    """Models on `device`, and a pipeline that has all the student's needs.

    A CLEAR student shares the teacher's weights: both lie on the device before one is made of the
    other, because moving them apart would copy.

    Args:
        recipe: what is built.
        device: of the transformers and the VAE.
        dtype: of the teacher and of what does not learn.

    Raises:
        ValueError: models that do not fit each other or the loss terms.
    """
    model = recipe.model
    # What is copied is copied in float32; what is shared must have its last dtype before.
    pipeline = open_teacher(recipe, dtype if model.is_clear else torch.float32)
    teacher = None if pipeline is None else pipeline.transformer.to(device)
    vae = build_vae(recipe, pipeline)
    torch.manual_seed(recipe.seed)
    student = _build_student(recipe, teacher)
    if model.pretrained_model_name_or_path is not None:
        start_from(student, model.pretrained_model_name_or_path)
    learns = torch.float32 if model.master_weights else dtype
    choose_trainable(
        student.to(device),
        model.learns,
        dtype=learns,
        rank=model.rank,
        lora_alpha=model.lora_alpha,
    )
    models = Models(
        student=student.train(),
        teacher=teacher if needs_teacher(recipe.loss) else None,
        vae=vae.to(device).eval().requires_grad_(False),
        id2label={},
    )
    check_loss_weights(
        recipe.loss,
        has_teacher=teacher is not None,
        has_variance=models.has_variance,
        process=model.process,
        has_attention=model.is_clear,
    )
    if models.teacher is not None:
        models.teacher.to(dtype).eval().requires_grad_(False)
    if pipeline is None:
        pipeline = _new_pipeline(recipe, vae)
    pipeline.register_modules(transformer=None, vae=vae)
    return models, pipeline


def build_vae(recipe: Recipe, pipeline: DiffusionPipeline | None) -> ModelMixin:
    """In float32, as the cache's was; a model without teacher and VAE learns pixels."""
    if recipe.model.vae is not None:
        return AutoencoderKL.from_pretrained(recipe.model.vae)
    if pipeline is None:
        channels = recipe.model.config.get("in_channels", 4)
        return PixelAutoencoder.of_latents(
            channels // 4 if recipe.model.family == "flux" else channels
        )
    if pipeline.vae is None:
        raise ValueError("`model.vae` must be given for a teacher without an autoencoder, got None")
    folder = Path(str(recipe.model.pretrained_teacher_model)) / "vae"
    return type(pipeline.vae).from_pretrained(folder)


def _new_pipeline(recipe: Recipe, vae: ModelMixin) -> DiffusionPipeline:
    """The pipeline of a model that has no teacher; prompts are to be given as embeddings."""
    kind = TEXT_PIPELINES[recipe.model.family]
    scheduler: Any
    if recipe.model.process == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=recipe.flow.shift or 1.0)
    else:
        scheduler = DPMSolverMultistepScheduler(**asdict(recipe.noise))
    nothing = dict.fromkeys(kind.text_components)
    return kind.pipelines[0](transformer=None, vae=vae, scheduler=scheduler, **nothing)


def build_family(recipe: Recipe, student: ModelMixin, vae: ModelMixin) -> Family:
    """How the student and its teacher are called."""
    if recipe.model.family == "flux":
        return FluxFamily(student.config, recipe.flow.guidance_scale)
    if recipe.model.family == "sd3":
        return SD3Family(student.config)
    return PixArtFamily(student.config, student.use_additional_conditions, vae_reduction(vae))


def build_flow(recipe: Recipe, pipeline: DiffusionPipeline) -> FlowProcess:
    """The noising process of FLUX or SD3, by default with the shift of the pipeline's scheduler."""
    flow, config = recipe.flow, pipeline.scheduler.config
    shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", 1.0)
    return FlowProcess(
        config.get("num_train_timesteps", 1000),
        shift if flow.shift is None else flow.shift,
        flow.weighting_scheme,
        flow.logit_mean,
        flow.logit_std,
        flow.mode_scale,
    )


def with_transformer(pipeline: DiffusionPipeline, transformer: ModelMixin) -> DiffusionPipeline:
    """A pipeline of the same parts, and settings, with this transformer."""
    made = type(pipeline)(**{**pipeline.components, "transformer": transformer})
    made.set_progress_bar_config(disable=True)
    assert text_family(made)
    return made
