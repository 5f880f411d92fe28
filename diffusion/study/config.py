"""The typed description of a study, and the recipe of each of its runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..evaluation import check_feature_space
from ..losses import needs_teacher
from ..sampling import SCHEDULERS
from ..training.config import (
    PIPELINE_AT_STEP,
    Recipe,
    check_field,
    parse_config,
    parse_recipe,
)

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One student.

    Args:
        title: what the table calls it.
        lengths: when it is measured, in shares of the teacher's steps; it trains to the last.
        set: fields of the student's recipe that differ, by dotted name, e.g.
            ``model.config.num_linear_heads``.
        donor_length: it inherits from the teacher as it was at this share of its steps.
    """

    title: str
    lengths: list[float]
    set: dict[str, Any] = field(default_factory=dict)
    donor_length: float = 1.0

    def __post_init__(self) -> None:
        rising = sorted(set(self.lengths)) == self.lengths and self.lengths and self.lengths[0] > 0
        check_field(bool(rising), "arms.lengths", "be positive and rising", self.lengths)
        share = self.donor_length
        check_field(0 < share <= 1, "arms.donor_length", "be in (0, 1]", share)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a trained model is judged: all from the same noise, without guidance.

    Args:
        num_images: samples, balanced over the classes.
        num_inference_steps, scheduler: of the sampler, see `lintra.diffusion.sampling.SCHEDULERS`.
        batch_size: samples at once.
        seed: of the first sample's noise.
        space, weights: feature space of the Frechet distance and the classifier, see
            `open_feature_space`.
        picture_labels: classes that are shown.
        num_pictures: images of a row of the picture.
        throughput_batch: images of the forward passes whose speed is measured.
    """

    num_images: int = 5000
    num_inference_steps: int = 25
    scheduler: str = "dpmsolver"
    batch_size: int = 1000
    seed: int = 1_000_000
    space: str = "digits"
    weights: str | None = None
    picture_labels: list[int] = field(default_factory=lambda: [*range(10)])
    num_pictures: int = 10
    throughput_batch: int = 256

    def __post_init__(self) -> None:
        known = ", ".join(SCHEDULERS)
        is_known = self.scheduler in SCHEDULERS
        check_field(is_known, "evaluation.scheduler", f"be one of {known}", self.scheduler)
        for name in ("num_images", "num_inference_steps", "batch_size", "throughput_batch"):
            value = getattr(self, name)
            check_field(value > 1, f"evaluation.{name}", "be greater than 1", value)
        check_feature_space(self.space, self.weights)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A teacher, a student's recipe, and the arms.

    Args:
        output_dir: a folder a run in it, and the results.
        teacher: recipe of the teacher, a YAML file.
        student: recipe that all arms start from.
        arms: by the name of their folder.
        data_path: file or folder of the images, for every run.
        teacher_steps: optimiser steps of the teacher; none takes its recipe's.
        teacher_set: fields of the teacher's recipe that differ, by dotted name.
        all_runs: fields of every recipe, by dotted name.
        donor_lengths: shares of the teacher's steps at which it is kept as a donor, beside those
            that the arms ask for.
        seed: of every run.
        evaluation: how models are judged.
    """

    output_dir: str
    teacher: str
    student: str
    arms: dict[str, Arm]
    data_path: str | None = None
    teacher_steps: int | None = None
    teacher_set: dict[str, Any] = field(default_factory=dict)
    all_runs: dict[str, Any] = field(default_factory=dict)
    donor_lengths: list[float] = field(default_factory=list)
    seed: int = 0
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        for name in ("teacher", "student"):
            file = getattr(self, name)
            check_field(Path(file).is_file(), name, "be an existing recipe", file)
        check_field(bool(self.arms), "arms", "name one at least", self.arms)
        odd = [name for name in self.arms if name == TEACHER or not name.replace("_", "").isalnum()]
        check_field(not odd, "arms", f"have names of letters, digits and _, not {TEACHER}", odd)

    @property
    def runs(self) -> list[str]:
        """Names of all runs, the teacher first."""
        return [TEACHER, *self.arms]

    def select(self, arms: Sequence[str] | None) -> "Study":
        """The study with these arms only; None keeps all. The teacher serves the others too.

        Raises:
            ValueError: an arm that the study does not have.
        """
        if arms is None:
            return self
        unknown = [name for name in arms if name not in self.arms]
        check_field(not unknown, "only", f"name arms of {', '.join(self.arms)}", unknown)
        return replace(self, arms={name: self.arms[name] for name in self.arms if name in arms})

    def title(self, run: str) -> str:
        return "DiT teacher" if run == TEACHER else self.arms[run].title

    def folder(self, run: str) -> Path:
        return Path(self.output_dir) / run

    def steps(self, run: str) -> list[int]:
        """Steps at which a run is measured; it trains to the last."""
        if run == TEACHER:
            return [self._whole]
        return [self._step_at(share) for share in self.arms[run].lengths]

    def pipeline(self, run: str, step: int) -> Path:
        """Folder of a run's averaged model at `step`."""
        is_last = step == self.steps(run)[-1]
        return self.folder(run) / ("pipeline" if is_last else PIPELINE_AT_STEP.format(step=step))

    def donor_step(self, arm: str) -> int:
        return self._step_at(self.arms[arm].donor_length)

    def _step_at(self, share: float) -> int:
        return max(1, round(share * self._whole))

    def needs(self, run: str) -> list[Path]:
        """Pipelines that must be there before a run can start."""
        if run == TEACHER:
            return []
        recipe = self._student_recipe(run)
        if recipe.model.inherit == "none" and not needs_teacher(recipe.loss):
            return []
        steps = dict.fromkeys((self.donor_step(run), self._whole))
        return [self.pipeline(TEACHER, step) for step in steps]

    def recipe(self, run: str) -> Recipe:
        """The recipe of a run.

        Raises:
            ValueError: its teacher is not there yet.
        """
        if run == TEACHER:
            return self._teacher_recipe()
        recipe = self._student_recipe(run)
        missing = [str(folder) for folder in self.needs(run) if not folder.is_dir()]
        check_field(not missing, f"arms.{run}", "have its teacher trained before", missing)
        model = recipe.model
        if self.needs(run):
            teacher = self.pipeline(TEACHER, self._whole)
            donor = self.pipeline(TEACHER, self.donor_step(run))
            model = replace(
                model,
                pretrained_teacher_model=str(teacher),
                pretrained_donor_model=None if donor == teacher else str(donor),
            )
        else:
            config = {**self._teacher_recipe().model.config, **model.config}
            model = replace(model, pretrained_teacher_model=None, config=config)
        return replace(recipe, model=model)

    @cached_property
    def _whole(self) -> int:
        """Steps of the teacher."""
        return self.teacher_steps or self._parse(self.teacher, TEACHER).training.max_train_steps

    def _teacher_recipe(self) -> Recipe:
        recipe = self._parse(self.teacher, TEACHER)
        shares = {*self.donor_lengths, *(arm.donor_length for arm in self.arms.values())}
        donors = {self._step_at(share) for share in shares} - {self._whole}
        return replace(
            recipe,
            training=replace(recipe.training, max_train_steps=self._whole),
            checkpoint=replace(recipe.checkpoint, pipeline_steps=sorted(donors)),
        )

    def _student_recipe(self, arm: str) -> Recipe:
        """The recipe without its teacher, whose folder may not exist yet."""
        recipe = self._parse(self.student, arm)
        *marks, last = self.steps(arm)
        return replace(
            recipe,
            training=replace(recipe.training, max_train_steps=last),
            checkpoint=replace(recipe.checkpoint, pipeline_steps=marks),
        )

    def _parse(self, file: str, run: str) -> Recipe:
        own = self.teacher_set if run == TEACHER else self.arms[run].set
        fields = {**self.all_runs, **own}
        fields |= {"output_dir": str(self.folder(run)), "seed": self.seed}
        fields["checkpoint.resume_from_checkpoint"] = "latest"
        if self.data_path is not None:
            fields["data.path"] = self.data_path
        if run != TEACHER:
            # Any folder that exists passes for the teacher's until `recipe` puts it in.
            fields["model.pretrained_teacher_model"] = str(Path(file).parent.absolute())
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()}
        words = [f"--{name}={text}" for name, text in texts.items()]
        return parse_recipe([f"--config={file}", *words], f"recipe of {run}", "")


def check_study(study: Study) -> None:
    """Reads the recipe of every run, so that a mistake in the last one shows before the first.

    A wrong field ends the process with one line and code 2, as `parse_recipe` does.
    """
    study.recipe(TEACHER)
    for arm in study.arms:
        study.needs(arm)


def parse_study(arguments: Sequence[str], prog: str, description: str) -> Study:
    """Reads `--config study.yaml` and overrides such as `--teacher_steps 6000`."""
    return parse_config(Study, arguments, prog, description)
