"""Recipes of seconds for the training tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lintra.diffusion.training.config import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    FlowConfig,
    LoggingConfig,
    ModelConfig,
    Recipe,
    TrainingConfig,
    ValidationConfig,
)

TINY_DIGITS_MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 1,
    "sample_size": 8,
    "num_embeds_ada_norm": 1000,
}
DISTILLATION = {
    "noise": 1.0,
    "vlb": 1.0,
    "noise_distillation": 0.5,
    "variance_distillation": 0.05,
}


def digits_recipe(output_dir: Path, **groups: dict[str, Any]) -> Recipe:
    """A DiT on 8 x 8 digits from scratch; `groups` change fields of a recipe's groups."""
    recipe = Recipe(
        output_dir=str(output_dir),
        model=ModelConfig(kind="dit", config=TINY_DIGITS_MODEL),
        data=DataConfig(source="digits", resolution=8),
        training=TrainingConfig(max_train_steps=6, train_batch_size=4, learning_rate=1e-3),
        checkpoint=CheckpointConfig(checkpointing_steps=0),
        ema=EMAConfig(ema_decay=0.9),
        validation=ValidationConfig(num_validation_images=0, num_inference_steps=2),
        logging=LoggingConfig(logging_steps=1),
    )
    values = {group: getattr(recipe, group) for group in groups}
    changed = {
        group: {**value, **groups[group]} if group == "loss" else replace(value, **groups[group])
        for group, value in values.items()
    }
    return replace(recipe, **changed)


def distillation_recipe(output_dir: Path, teacher: Path, **groups: dict[str, Any]) -> Recipe:
    """A LiT that is distilled from the pipeline `teacher` on digits."""
    model = {"kind": "lit", "pretrained_teacher_model": str(teacher), "config": {}}
    return digits_recipe(
        output_dir,
        **{**groups, "model": {**model, **groups.get("model", {})}, "loss": DISTILLATION},
    )


TEXT_LOSSES = {
    "flux": {"flow": 1.0, "output_distillation": 0.5, "attention_distillation": 0.05},
    "pixart": {**DISTILLATION, "noise_distillation": 1.0},
}
TEXT_LOSSES["sd3"] = TEXT_LOSSES["flux"]
TEXT_STUDENTS = {
    "flux": {"kind": "clear_flux", "config": {"radius": 2}},
    "sd3": {"kind": "clear_sd3", "config": {"radius": 2}},
    "pixart": {"kind": "lit_pixart", "inherit": "with_out"},
}


def text_recipe(
    output_dir: Path, family: str, teacher: Path, cache: Path, **groups: dict[str, Any]
) -> Recipe:
    """Distils a tiny FLUX, SD3 or PixArt on a cache; `groups` change fields, `loss` the whole."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {**TEXT_STUDENTS[family], "pretrained_teacher_model": str(teacher)},
        "data": {"source": "prompt_cache", "path": str(cache)},
        "training": {"max_train_steps": 4, "train_batch_size": 2, "learning_rate": 1e-3},
        "checkpoint": {"checkpointing_steps": 0},
        "ema": {"use_ema": False},
        "validation": {"num_validation_images": 0, "num_inference_steps": 2},
        "logging": {"logging_steps": 1},
    }
    values = {name: {**value, **groups.get(name, {})} for name, value in defaults.items()}
    return Recipe(
        output_dir=str(output_dir),
        model=ModelConfig(**values["model"]),
        data=DataConfig(**values["data"]),
        training=TrainingConfig(**values["training"]),
        checkpoint=CheckpointConfig(**values["checkpoint"]),
        ema=EMAConfig(**values["ema"]),
        validation=ValidationConfig(**values["validation"]),
        logging=LoggingConfig(**values["logging"]),
        flow=FlowConfig(**groups.get("flow", {})),
        loss=groups.get("loss", TEXT_LOSSES[family]),
    )
