"""The typed description of a study, and the recipe of each of its runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..losses import needs_teacher
from ..training.config import (
    PIPELINE_AT_STEP,
    DataConfig,
    Recipe,
    check_field,
    parse_config,
    parse_recipe,
)
from .evaluation import Evaluation

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One student.

    Args:
        title: what the table calls it.
        lengths: when it is measured, in shares of the teacher's steps; it trains to the last. Only
            0 is the student as it starts.
        set: fields of the student's recipe that differ, by dotted name, e.g.
            ``model.config.num_linear_heads``.
        donor_length: it inherits from the teacher as it was at this share of its steps.
    """

    title: str
    lengths: list[float]
    set: dict[str, Any] = field(default_factory=dict)
    donor_length: float = 1.0

    def __post_init__(self) -> None:
        is_rising = sorted(set(self.lengths)) == self.lengths and min(self.lengths, default=0) > 0
        is_fine = is_rising or self.lengths == [0]
        check_field(is_fine, "arms.lengths", "be positive and rising, or only 0", self.lengths)
        share = self.donor_length
        check_field(0 < share <= 1, "arms.donor_length", "be in (0, 1]", share)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A teacher, a student's recipe, and the arms.

    Args:
        output_dir: a folder a run in it, and the results.
        teacher: recipe of the teacher, a YAML file.
        student: recipe that all arms start from.
        arms: by the name of their folder.
        heading, about: of the report, and the text below it.
        teacher_title: what the table calls the teacher.
        data_path: file or folder of the images, for every run.
        images: for text to image, the labelled images: the study makes a prompt cache of them, with
            class names as prompts. Classes to image has them in its recipes.
        prompt_tokens: words that a class name has at most, see `WordEmbeddings`.
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
    heading: str | None = None
    about: str | None = None
    teacher_title: str = "teacher"
    data_path: str | None = None
    images: DataConfig | None = None
    prompt_tokens: int = 4
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
        if self.images is not None:
            scheduler = self.evaluation.scheduler
            check_field(scheduler is None, "evaluation.scheduler", "be none for prompts", scheduler)
            is_labelled = self.images.source != "prompt_cache"
            check_field(is_labelled, "images.source", "be labelled images", self.images.source)
            path = self.image_data.path
            is_there = self.images.source == "digits" if path is None else Path(path).exists()
            check_field(is_there, "data_path", "exist", path)
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
        return self.teacher_title if run == TEACHER else self.arms[run].title

    @property
    def image_data(self) -> DataConfig:
        """The labelled images of text to image."""
        assert self.images is not None
        return replace(self.images, path=self.data_path or self.images.path)

    @property
    def cache(self) -> Path:
        """Folder of the prompt cache that is made of `images`."""
        return Path(self.output_dir) / "cache"

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
        return max(1, round(share * self._whole)) if share else 0

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
            ValueError: its teacher, or the prompt cache, is not there yet.
        """
        recipe = self.teacher_recipe() if run == TEACHER else self._student_recipe(run)
        if self.images is not None:
            recipe = replace(recipe, data=replace(recipe.data, path=str(self.cache)))
        if run == TEACHER:
            return recipe
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
            config = {**self.teacher_recipe().model.config, **model.config}
            model = replace(model, pretrained_teacher_model=None, config=config)
        return replace(recipe, model=model)

    @cached_property
    def _whole(self) -> int:
        """Steps of the teacher."""
        return self.teacher_steps or self._parse(self.teacher, TEACHER).training.max_train_steps

    def teacher_recipe(self) -> Recipe:
        """The recipe of the teacher, without the prompt cache, which may not exist yet."""
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
        is_whole = recipe.model.learns == "all" or not marks
        name = f"arms.{arm}.lengths"
        check_field(is_whole, name, "be one where not all weights learn", self.arms[arm].lengths)
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
        # Any folder that exists passes for what is not made yet until `recipe` puts it in.
        existing = str(Path(file).parent.absolute())
        if self.images is not None:
            fields["data.path"] = existing
        elif self.data_path is not None:
            fields["data.path"] = self.data_path
        if run != TEACHER:
            fields["model.pretrained_teacher_model"] = existing
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()}
        words = [f"--{name}={text}" for name, text in texts.items()]
        return parse_recipe([f"--config={file}", *words], f"recipe of {run}", "")


def check_study(study: Study) -> None:
    """Reads the recipe of every run, so that a mistake in the last one shows before the first.

    A wrong field ends the process with one line and code 2, as `parse_recipe` does.
    """
    teacher = study.teacher_recipe()
    is_text = teacher.model.process == "flow"
    check_field(
        is_text == (study.images is not None),
        "images",
        f"be {'given' if is_text else 'none'} for a teacher that is a {teacher.model.kind}",
        study.images and study.images.source,
    )
    for arm in study.arms:
        study.needs(arm)


def parse_study(arguments: Sequence[str], prog: str, description: str) -> Study:
    """Reads `--config study.yaml` and overrides such as `--teacher_steps 6000`."""
    return parse_config(Study, arguments, prog, description)
