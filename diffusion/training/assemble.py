"""The models of a run: teacher, student, autoencoder and the pipeline that the student ends in."""

from dataclasses import asdict, dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
)
from diffusers.models.modeling_utils import ModelMixin

from ..ddpm import DDPMProcess
from ..inheritance import inherit_weights, student_config
from ..initialization import initialize_dit
from ..io import build_dit_pipeline, load_pipeline
from ..losses import check_loss_weights, needs_teacher
from ..models.autoencoder_pixel import PixelAutoencoder
from ..models.transformer_dit import OfficialDiTTransformer2DModel
from ..models.transformer_lit import LiTTransformer2DModel
from .config import NoiseConfig, Recipe
from .objective import disable_internal_label_dropout
from .trainable import start_from

STUDENTS: dict[str, type[DiTTransformer2DModel]] = {
    "dit": DiTTransformer2DModel,
    "lit": LiTTransformer2DModel,
}


@dataclass(frozen=True)
class Models:
    """What a run trains and needs: the student in training mode, the others frozen.

    Attributes:
        student: the trained transformer.
        teacher: None unless a loss term compares with it.
        vae: an `AutoencoderKL`, or a `PixelAutoencoder` for pixel space.
        id2label: class names for the pipeline; none for text to image.
    """

    student: ModelMixin
    teacher: ModelMixin | None
    vae: ModelMixin
    id2label: dict[int, str]

    @property
    def in_pixel_space(self) -> bool:
        return isinstance(self.vae, PixelAutoencoder)

    @property
    def has_variance(self) -> bool:
        return self.student.out_channels == 2 * self.student.config.in_channels


def check_noise_schedule(noise: NoiseConfig, teacher: DiffusionPipeline) -> None:
    """Raises ValueError unless the recipe's schedule is that of the teacher's pipeline."""
    for name, ours in asdict(noise).items():
        theirs = teacher.scheduler.config.get(name)
        if theirs != ours:
            raise ValueError(
                f"`noise.{name}` must be that of the teacher's pipeline, {theirs}, got {ours}"
            )


def _load_pretrained(name: str, path: str | None, noise: NoiseConfig) -> DiTPipeline | None:
    """The pipeline of the recipe's field `name`, whose schedule must be the recipe's."""
    if path is None:
        return None
    pipeline = load_pipeline(path)
    if not isinstance(pipeline, DiTPipeline):
        raise ValueError(f"`{name}` must be a DiTPipeline, got a {type(pipeline).__name__}")
    for part in ("transformer", "scheduler"):
        if getattr(pipeline, part) is None:
            raise ValueError(f"`{name}` must have a {part}, got none in {path}")
    check_noise_schedule(noise, pipeline)
    return pipeline


def _build_student(
    recipe: Recipe, teacher: DiTTransformer2DModel | None, donor: DiTTransformer2DModel | None
) -> DiTTransformer2DModel:
    model = recipe.model
    cls = STUDENTS[model.kind]
    if model.kind == "dit" and isinstance(donor, OfficialDiTTransformer2DModel):
        cls = OfficialDiTTransformer2DModel
    student = cls(**student_config(cls, donor, model.config))
    if teacher is not None and student.config.sample_size != teacher.config.sample_size:
        raise ValueError(
            f"`model.config.sample_size` must be the teacher's {teacher.config.sample_size},"
            f" got {student.config.sample_size}"
        )
    if donor is None or model.inherit == "none":
        initialize_dit(student)
    else:
        inherit_weights(student, donor, model.inherit)
    return student


def _build_vae(recipe: Recipe, source: DiTPipeline | None, channels: int) -> ModelMixin:
    if recipe.model.vae is not None:
        return AutoencoderKL.from_pretrained(recipe.model.vae)
    if source is None:
        return PixelAutoencoder(in_channels=channels)
    if source.vae is None:
        raise ValueError("`model.vae` must be given for a teacher without an autoencoder, got None")
    return source.vae


def build_models(recipe: Recipe, classes: list[str]) -> Models:
    """Teacher, student and autoencoder of a recipe, on the CPU in float32.

    Raises:
        ValueError: models that do not fit each other, the data's classes or the loss terms.
    """
    names = ("pretrained_teacher_model", "pretrained_donor_model")
    taught_by, given_by = (
        _load_pretrained(f"model.{name}", getattr(recipe.model, name), recipe.noise)
        for name in names
    )
    teacher = None if taught_by is None else taught_by.transformer
    source = taught_by if given_by is None else given_by
    torch.manual_seed(recipe.seed)
    student = _build_student(recipe, teacher, None if source is None else source.transformer)
    if recipe.model.pretrained_model_name_or_path is not None:
        start_from(student, recipe.model.pretrained_model_name_or_path)
    if recipe.model.trainable not in (None, "all"):
        raise ValueError(
            f"`model.trainable` must be all for a {recipe.model.kind}, got"
            f" {recipe.model.trainable!r}"
        )
    if len(classes) > student.config.num_embeds_ada_norm:
        raise ValueError(
            f"`model.config.num_embeds_ada_norm` must be at least the {len(classes)} classes of the"
            f" data, got {student.config.num_embeds_ada_norm}"
        )
    encoded_by = given_by if taught_by is None else taught_by
    vae = _build_vae(recipe, encoded_by, student.config.in_channels)
    models = Models(
        student=student.train(),
        teacher=teacher if needs_teacher(recipe.loss) else None,
        vae=vae.eval().requires_grad_(False),
        id2label=dict(enumerate(classes)),
    )
    check_loss_weights(
        recipe.loss, has_teacher=teacher is not None, has_variance=models.has_variance
    )
    disable_internal_label_dropout(models.student)
    if models.teacher is not None:
        models.teacher.eval().requires_grad_(False)
    return models


def build_process(noise: NoiseConfig) -> DDPMProcess:
    """The noising process of a schedule; the product of alphas is taken in float64."""
    betas = DDPMScheduler(**asdict(noise)).betas
    return DDPMProcess((1 - betas.double()).cumprod(0))


def build_pipeline(
    transformer: DiTTransformer2DModel, models: Models, noise: NoiseConfig
) -> DiTPipeline:
    """The pipeline of a trained transformer, with a DDIM sampler of the training's schedule."""
    # Images lie in [-1, 1], latents do not.
    scheduler = DDIMScheduler(**asdict(noise), clip_sample=models.in_pixel_space)
    return build_dit_pipeline(transformer, models.vae, scheduler, models.id2label)
