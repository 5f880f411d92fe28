"""Recipes of seconds for the training tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lintra.diffusion.training.config import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
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
