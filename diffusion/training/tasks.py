"""What the loop trains: classes or prompts; models, data, objective and where it ends."""

from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin

from ..ddpm import DDPMProcess
from ..flow import FlowProcess
from ..io import save_pipeline
from ..losses import compares_attention, forces_attention
from .assemble import Models, build_models, build_pipeline, build_process
from .assemble_text import build_family, build_flow, build_text_models, with_transformer
from .attention_outputs import AttentionOutputs
from .config import Recipe
from .data import PromptData, TrainingData, check_images_fit
from .families import ClassFamily, attention_layer_names
from .images import open_recipe_images
from .latent_cache import weights_fingerprint
from .objective import Objective
from .prompt_cache import PromptCache
from .text_pipelines import TEXT_PIPELINES, encoder_fingerprints
from .validation import validate, validate_prompts
from .verification import SharedVerifier

_HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Task(Protocol):
    """A run's models, data and objective, and what becomes of a trained transformer."""

    models: Models
    objective: Objective

    @property
    def data(self) -> TrainingData | PromptData:
        """The data set, and what makes its batches latents and conditions."""
        ...

    def begin(self) -> None:
        """The main process calls this when training starts: files may be written from now on."""
        ...

    def build_pipeline(self, transformer: ModelMixin) -> DiffusionPipeline:
        """A pipeline with the transformer."""
        ...

    def sample_grid(self, pipeline: DiffusionPipeline, file: Path) -> None:
        """Writes pictures of the pipeline."""
        ...

    def save(self, pipeline: DiffusionPipeline, folder: Path, texts: dict[str, str]) -> None:
        """Writes the pipeline, with further files."""
        ...


class ClassTask:
    """DiT and LiT on labelled images."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator):
        self.recipe = recipe
        data = recipe.data
        beside = Path(recipe.output_dir) / "images"
        if data.latent_cache is not None:
            beside = Path(data.latent_cache)
        file = beside.with_name(f"{beside.name}.verified.json")
        self.verifier = SharedVerifier(accelerator, file)
        images = open_recipe_images(data, self.verifier)
        self.num_classes = len(images.classes)
        self.models = build_models(recipe, images.classes)
        check_images_fit(images, self.models)
        # The VAE stays in float32: some overflow in float16.
        self.models.vae.to(accelerator.device)
        if self.models.teacher is not None:
            dtype = _HALF_DTYPES.get(accelerator.mixed_precision, torch.float32)
            self.models.teacher.to(device=accelerator.device, dtype=dtype)
        self.data = TrainingData(recipe, images, self.models, accelerator)
        config = self.models.student.config
        self.objective = Objective(
            ClassFamily(config),
            build_process(recipe.noise).to(accelerator.device),
            recipe.loss,
            dropout_prob=recipe.training.class_dropout_prob,
            unconditional={"class_labels": torch.tensor(config.num_embeds_ada_norm)},
        )

    def begin(self) -> None:
        self.verifier.save()

    def build_pipeline(self, transformer: ModelMixin) -> DiffusionPipeline:
        return build_pipeline(transformer, self.models, self.recipe.noise)

    def sample_grid(self, pipeline: DiffusionPipeline, file: Path) -> None:
        recipe = self.recipe
        validate(pipeline, recipe.validation, self.num_classes, recipe.seed, file)

    def save(self, pipeline: DiffusionPipeline, folder: Path, texts: dict[str, str]) -> None:
        save_pipeline(pipeline, folder, texts)


class TextTask:
    """FLUX, SD3 and PixArt on a cache of latents and prompt embeddings."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator):
        self.recipe = recipe
        self.source = recipe.model.pretrained_teacher_model
        dtype = _HALF_DTYPES.get(accelerator.mixed_precision, torch.float32)
        cache = PromptCache(
            str(recipe.data.path),
            family=recipe.model.family,
            text_encoders=self._text_encoders(),
        )
        self.models, self.pipeline = build_text_models(recipe, accelerator.device, dtype)
        self._check_cache(cache)
        self.data = PromptData(cache, accelerator.device, recipe.data.in_memory)
        self.objective = self._objective(cache, accelerator.device)

    def _text_encoders(self) -> dict[str, str] | None:
        """Fingerprints of the teacher's, None if it was saved without them."""
        if self.source is None:
            return None
        return encoder_fingerprints(self.source, self.recipe.model.family) or None

    def _check_cache(self, cache: PromptCache) -> None:
        """Raises ValueError unless the cache was made with the VAE and fits the student."""
        vae, config = self.models.vae, self.models.student.config
        cache.check_vae(weights_fingerprint(vae))
        # FLUX packs 2 x 2 latents into a token.
        packed = 4 if self.recipe.model.family == "flux" else 1
        sizes = {"channels": (cache.index["latent_channels"] * packed, config.in_channels)}
        shape = cache.index["embeddings"]
        width = config.get("caption_channels") or config.get("joint_attention_dim")
        sizes["prompt channels"] = (shape["prompt_embeds"][-1], width)
        if "pooled_prompt_embeds" in shape:
            sizes["pooled channels"] = (
                shape["pooled_prompt_embeds"][0],
                config.pooled_projection_dim,
            )
        for name, (found, expected) in sizes.items():
            if found != expected:
                raise ValueError(
                    f"`data.path` must be a cache with the model's {expected} {name}, got {found}"
                )

    def _objective(self, cache: PromptCache, device: torch.device) -> Objective:
        recipe, models = self.recipe, self.models
        process: DDPMProcess | FlowProcess
        if recipe.model.process == "flow":
            process = build_flow(recipe, self.pipeline)
        else:
            process = build_process(recipe.noise).to(device)
        attention = None
        if compares_attention(recipe.loss):
            names = attention_layer_names(
                models.student, recipe.model.attention_layers, forces_attention(recipe.loss)
            )
            assert models.teacher is not None
            attention = (
                AttentionOutputs(models.student, names),
                AttentionOutputs(models.teacher, names),
            )
        return Objective(
            build_family(recipe, models.student, models.vae),
            process,
            recipe.loss,
            dropout_prob=recipe.data.proportion_empty_prompts,
            unconditional={name: value.to(device) for name, value in cache.empty.items()},
            attention=attention,
        )

    def begin(self) -> None:
        """Nothing is written before the first checkpoint."""

    def build_pipeline(self, transformer: ModelMixin) -> DiffusionPipeline:
        return with_transformer(self.pipeline, transformer)

    def sample_grid(self, pipeline: DiffusionPipeline, file: Path) -> None:
        recipe = self.recipe
        validate_prompts(pipeline, self.data.cache, recipe.validation, recipe.seed, file)

    def save(self, pipeline: DiffusionPipeline, folder: Path, texts: dict[str, str]) -> None:
        """The text encoders, which training never opened, are linked from the teacher's folder."""
        parts = TEXT_PIPELINES[self.recipe.model.family].text_components
        origin = None if self.source is None else Path(self.source)
        save_pipeline(pipeline, folder, texts, origin=origin, parts=parts)


def make_task(recipe: Recipe, accelerator: Accelerator) -> Task:
    """The task of a recipe; raises ValueError for what a recipe can get wrong."""
    kind = ClassTask if recipe.model.family == "class" else TextTask
    return kind(recipe, accelerator)
