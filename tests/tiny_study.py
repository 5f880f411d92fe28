"""A study of seconds on digits."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from lintra.diffusion.study.config import Arm, Evaluation, Study
from tiny_recipes import DISTILLATION, digits_recipe

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


def make_study(folder: Path, **changes: object) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    teacher = asdict(digits_recipe(folder / "unused"))
    model = {"kind": "lit", "config": {}, "pretrained_teacher_model": None, "vae": None}
    student = teacher | {"model": model, "loss": DISTILLATION}
    files = {"teacher": folder / "teacher.yaml", "student": folder / "student.yaml"}
    files["teacher"].write_text(json.dumps(teacher))  # JSON is YAML
    files["student"].write_text(json.dumps(student))
    evaluation = Evaluation(
        num_images=20, num_inference_steps=2, batch_size=10, num_pictures=3, throughput_batch=2
    )
    study = Study(
        output_dir=str(folder / "study"),
        **{name: str(file) for name, file in files.items()},
        arms=ARMS,
        teacher_steps=8,
        evaluation=evaluation,
    )
    return replace(study, **changes)
