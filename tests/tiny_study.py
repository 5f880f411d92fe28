"""Studies of seconds on digits: LiT from a DiT, and CLEAR from a FLUX."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lintra.diffusion.study import speed
from lintra.diffusion.study.config import Arm, Study
from lintra.diffusion.study.evaluation import Evaluation
from lintra.diffusion.study.worker import measure_speed, train_and_measure
from lintra.diffusion.training.config import DataConfig
from tiny_clear import FLUX
from tiny_recipes import DISTILLATION, TEXT_LOSSES, digits_recipe

NO_TEACHER = {"loss.noise_distillation": 0.0, "loss.variance_distillation": 0.0}
ARMS = {
    "scratch": Arm(title="scratch", lengths=[0.25], set={"model.inherit": "none", **NO_TEACHER}),
    "hybrid": Arm(title="hybrid", lengths=[0.25, 0.5], donor_length=0.5),
    "softmax": Arm(
        title="softmax",
        lengths=[0.25],
        set={"model.kind": "dit", "model.inherit": "all", **NO_TEACHER},
    ),
}
CLEAR_ARMS = {
    "linearised": Arm(title="linearised", lengths=[0]),
    "clear": Arm(title="all terms", lengths=[0.5]),
}
# Squares of 2 x 2 grey pixels, packed by 2 x 2: 2 x 2 tokens of an 8 x 8 digit.
_FLUX = {**FLUX, "in_channels": 16, "num_layers": 1, "guidance_embeds": False}


def _make(
    folder: Path, teacher: dict[str, Any], student: dict[str, Any], evaluation: dict[str, Any]
) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"teacher": folder / "teacher.yaml", "student": folder / "student.yaml"}
    files["teacher"].write_text(json.dumps(teacher))  # JSON is YAML
    files["student"].write_text(json.dumps(student))
    return Study(
        output_dir=str(folder / "study"),
        **{name: str(file) for name, file in files.items()},
        arms=ARMS,
        teacher_title="DiT teacher",
        teacher_steps=8,
        evaluation=Evaluation(
            num_images=20,
            num_inference_steps=2,
            batch_size=10,
            num_pictures=3,
            throughput_batch=2,
            **evaluation,
        ),
    )


def make_study(folder: Path, **changes: object) -> Study:
    """Three LiT arms."""
    teacher = asdict(digits_recipe(folder / "unused"))
    model = {"kind": "lit", "config": {}, "pretrained_teacher_model": None, "vae": None}
    student = teacher | {"model": model, "loss": DISTILLATION}
    return replace(_make(folder, teacher, student, {}), **changes)


def make_clear_study(folder: Path, **changes: object) -> Study:
    """A CLEAR as it starts, and one that is distilled; digits are the words of the prompts."""
    model = {"kind": "flux", "config": _FLUX, "pretrained_teacher_model": None}
    teacher = asdict(digits_recipe(folder / "unused")) | {
        "model": model,
        "data": {
            "source": "prompt_cache",
            "path": str(folder),
            "in_memory": True,
            "proportion_empty_prompts": 0.1,
        },
        "loss": {"flow": 1.0},
    }
    student = teacher | {
        "model": {**model, "kind": "clear_flux", "config": {"radius": 1}, "attention_layers": [1]},
        "loss": TEXT_LOSSES["flux"],
    }
    study = _make(folder, teacher, student, {"scheduler": None, "guidance_scale": 2.0})
    common = {
        "arms": CLEAR_ARMS,
        "teacher_title": "FLUX teacher",
        "images": DataConfig(source="digits", resolution=8, split="test", random_flip=True),
        "prompt_tokens": 1,
        "heading": "CLEAR on digits",
        "about": "What this is.\n",
    }
    return replace(study, **{**common, **changes})


def finish_study(study: Study) -> None:
    """Trains and measures every run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "_SPEED_SECONDS", 0.01)
        for run in study.runs:
            assert train_and_measure(study, run) is None
        measure_speed(study, compiled=False)
