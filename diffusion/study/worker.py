"""One run of a study in a process of its own: train, then measure at every step that counts."""

import json
import shutil
import time
from pathlib import Path

import torch

from ..training.checkpoint import checkpoint_step, list_checkpoints
from ..training.loop import RECIPE_FILE, Trainer
from .config import TEACHER, Study
from .measure import quality
from .speed import speeds

SPEED_FILE = "speed.json"


def result_file(study: Study, run: str, step: int) -> Path:
    """Where a run's numbers at `step` are, once it was measured there."""
    return study.folder(run) / f"measured-{step}.json"


def picture_file(study: Study, run: str, step: int) -> Path:
    """uint8 pictures ``(N, 3, H, W)`` of a run at `step`, as a file of `torch.save`."""
    return study.folder(run) / f"pictures-{step}.pt"


def is_trained(study: Study, run: str) -> bool:
    """Its last model is there, and of as many steps as the study now asks for."""
    last = study.steps(run)[-1]
    record = study.pipeline(run, last) / RECIPE_FILE
    return (
        record.is_file() and json.loads(record.read_text())["training"]["max_train_steps"] == last
    )


def is_finished(study: Study, run: str) -> bool:
    """Trained, and measured wherever it is to be."""
    return all(result_file(study, run, step).is_file() for step in study.steps(run))


def forget_copies(study: Study) -> None:
    """Removes students of no steps if their teacher is going to be trained: they were another's."""
    if not (is_trained(study, TEACHER) or is_finished(study, TEACHER)):
        for arm in study.arms:
            if study.steps(arm) == [0] and study.folder(arm).is_dir():
                shutil.rmtree(study.folder(arm))


def train_and_measure(study: Study, run: str) -> int | None:
    """Does what is left of a run; gives the signal that stopped it, None if it is finished."""
    if not is_trained(study, run):
        _drop_late_checkpoints(study, run)
        started = time.perf_counter()
        result = Trainer(study.recipe(run)).run()
        _add_seconds(study.folder(run) / "seconds.json", time.perf_counter() - started)
        if result.signum is not None:
            return result.signum
    for step in study.steps(run):
        if not result_file(study, run, step).is_file():
            numbers, pictures = quality(study, run, step)
            torch.save(pictures, picture_file(study, run, step))
            # Last: this file says that the run was measured.
            result_file(study, run, step).write_text(json.dumps(numbers, indent=1))
    return None


def _drop_late_checkpoints(study: Study, run: str) -> None:
    """Removes checkpoints from which a step that is yet to be measured cannot be reached."""
    missing = [
        step
        for step in study.steps(run)
        if not (result_file(study, run, step).is_file() or study.pipeline(run, step).is_dir())
    ]
    for checkpoint in list_checkpoints(study.folder(run)):
        if missing and checkpoint_step(checkpoint) > missing[0]:
            shutil.rmtree(checkpoint)


def measure_speed(study: Study, *, compiled: bool) -> None:
    """Forward speed of every trained run; nothing else may run meanwhile."""
    found = json.dumps(speeds(study, compiled=compiled), indent=1)
    (Path(study.output_dir) / SPEED_FILE).write_text(found)


def _add_seconds(file: Path, seconds: float) -> None:
    before = json.loads(file.read_text()) if file.is_file() else 0.0
    file.write_text(json.dumps(before + seconds))
