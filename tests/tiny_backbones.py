"""A tiny training run of a backbone: noisy images of three colours, and its recipe."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lintra.vision.training.config import (
    DataConfig,
    ModelConfig,
    NormConfig,
    Recipe,
    TrainingConfig,
)

COLOURS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]])


def write_npz(path: Path, count: int, seed: int = 0) -> Path:
    """Noisy images of three colours."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    noise = generator.integers(-30, 30, (count, 16, 16, 3))
    images = (COLOURS[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    np.savez(path, images=images, labels=labels)
    return path


def write_files(folder: Path) -> dict[str, str]:
    """Training and validation images."""
    return {
        "train": str(write_npz(folder / "train.npz", 52)),
        "val": str(write_npz(folder / "val.npz", 13, seed=1)),
    }


def small_recipe(folder: Path, files: dict[str, str], **groups: dict[str, Any]) -> Recipe:
    recipe = Recipe(
        output_dir=str(folder),
        model=ModelConfig(
            name="deit_tiny_slab_patch16_224",
            args={
                "img_size": 16,
                "patch_size": 4,
                "embed_dim": 16,
                "depth": 2,
                "num_heads": 2,
            },
        ),
        data=DataConfig(
            source="npz",
            **files,
            batch_size=8,
            workers=0,
            mixup=0,
            cutmix=0,
            auto_augment=None,
            reprob=0,
            color_jitter=0,
        ),
        training=TrainingConfig(
            epochs=3, warmup_epochs=0, base_lr=1e-2, base_size=8, mixed_precision="no"
        ),
        norm=NormConfig(fraction=0.5, recalibration_passes=2),
        logging_steps=1,
    )
    return replace(
        recipe,
        **{
            name: replace(getattr(recipe, name), **value) if isinstance(value, dict) else value
            for name, value in groups.items()
        },
    )
