"""The training loop: from scratch or distilling, on one process or many, resumable to the digit."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..compilation import compile_blocks
from .batches import make_loader, step_generator
from .checkpoint import CheckpointKeeper, list_checkpoints, resolve_checkpoint
from .config import PIPELINE_AT_STEP, Recipe
from .metrics import MetricsFile, Window, plot_losses
from .optimizers import make_optimizer
from .signals import StopRequest
from .tasks import make_task
from .trainable import finish, has_lora, save_trained, trains_all

# In the folder of a trained pipeline: the recipe that made it.
RECIPE_FILE = "recipe.json"
# Not cuDNN's, which torch 2.11 takes by default on an H100: the first backward pass of a small FLUX
# (260 tokens, 4 heads of 64 channels, batch 256) ends in an illegal memory access with it and none
# with the others (2026-11-24), and some masks give NaN (pytorch/pytorch#196678).
_SOFTMAX_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class TrainingDiverged(RuntimeError):
    """The loss or the gradients became NaN or infinite; the last checkpoint is untouched."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        step: optimiser steps done.
        signum: the signal that stopped the run, None if it is complete.
        pipeline: folder of the trained pipeline, None if the run was stopped.
        checkpoint: folder that a stopped run resumes from, None if it is complete.
    """

    step: int
    signum: int | None
    pipeline: Path | None
    checkpoint: Path | None


class Trainer:
    """One run of a recipe: `Trainer(recipe).run()`.

    What a recipe can get wrong raises ValueError in the constructor, before the first step and
    before anything in the output folder changes.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.output_dir = Path(recipe.output_dir)
        resume_from = resolve_checkpoint(recipe.checkpoint.resume_from_checkpoint, self.output_dir)
        config = recipe.training
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # A plugin, because a launcher for DeepSpeed would overrule a number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                config.gradient_accumulation_steps
            ),
            log_with=recipe.logging.report_to,
            project_dir=str(self.output_dir),
        )
        self.is_main = self.accelerator.is_main_process
        kind = self.accelerator.distributed_type
        self.is_sharded = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if self.is_sharded and recipe.ema.use_ema:
            raise ValueError("`ema.use_ema` must be false where parameters are sharded, got true")
        if self.is_sharded and recipe.checkpoint.pipeline_steps:
            raise ValueError(
                "`checkpoint.pipeline_steps` must be empty where parameters are sharded, got"
                f" {recipe.checkpoint.pipeline_steps}"
            )
        if kind == DistributedType.FSDP and recipe.model.trainable == "lora":
            raise ValueError("`model.trainable` must not be lora under FSDP, got 'lora'")
        if kind == DistributedType.DEEPSPEED:
            # It clips by itself, and no loader of accelerate tells it the size of batches.
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = config.train_batch_size
            settings["gradient_clipping"] = config.max_grad_norm
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        self.task = make_task(recipe, self.accelerator)
        self.models = self.task.models
        if recipe.checkpoint.pipeline_steps and not trains_all(self.models.student):
            raise ValueError(
                "`checkpoint.pipeline_steps` must be empty unless all weights are trained, got"
                f" {recipe.checkpoint.pipeline_steps}"
            )
        self._prepare_student()
        self.keeper = CheckpointKeeper(self.accelerator, self.output_dir, recipe.checkpoint)
        self.step = 0 if resume_from is None else self.keeper.load(resume_from)

    def _prepare_student(self) -> None:
        config, student = self.recipe.training, self.models.student
        if config.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        student.to(self.accelerator.device)
        for model in (student, self.models.teacher) if config.compile_blocks else ():
            if model is not None:
                compile_blocks(model, dynamic=False)
        self.trained = [value for value in student.parameters() if value.requires_grad]
        self.ema: EMAModel | None = None
        if self.recipe.ema.use_ema:
            # foreach: two launches for all parameters instead of two for each.
            self.ema = EMAModel(self.trained, decay=self.recipe.ema.ema_decay, foreach=True)
            self.accelerator.register_for_checkpointing(self.ema)
        optimizer = make_optimizer(self.trained, config)
        self.model, self.optimizer = self.accelerator.prepare(student, optimizer)
        # Not prepared: accelerate would advance it once a process.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self.accelerator.register_for_checkpointing(self.lr_scheduler)

    def run(self) -> TrainingResult:
        """Trains to `max_train_steps`, or until SIGINT or SIGTERM, which leave a checkpoint.

        Raises:
            TrainingDiverged: the loss is no longer finite.
        """
        self.metrics: MetricsFile | None = None
        if self.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.task.begin()
            self.metrics = MetricsFile(self.output_dir / "metrics.jsonl", self.step)
        if self.recipe.logging.report_to is not None:
            training = asdict(self.recipe.training)
            kinds = (int, float, str, bool)
            scalars = {key: value for key, value in training.items() if isinstance(value, kinds)}
            self.accelerator.init_trackers(self.recipe.logging.tracker_project_name, scalars)
        with StopRequest() as stop, sdpa_kernel(_SOFTMAX_BACKENDS):
            self._train(stop)
            is_done = self.step == self.recipe.training.max_train_steps
            pipeline = self._finish() if is_done else None
            checkpoint = None if is_done else self.keeper.save(self.step)
        self.accelerator.end_training()
        return TrainingResult(self.step, None if is_done else stop.signum, pipeline, checkpoint)

    def _train(self, stop: StopRequest) -> None:
        recipe, config = self.recipe, self.recipe.training
        accumulation = config.gradient_accumulation_steps
        batches = iter(
            make_loader(
                self.task.data.dataset,
                config.train_batch_size,
                seed=recipe.seed,
                start=self.step * accumulation,
                rank=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
                num_workers=recipe.data.dataloader_num_workers,
            )
        )
        progress = tqdm(
            total=config.max_train_steps,
            initial=self.step,
            disable=not self.is_main,
            desc=self.output_dir.name,
            mininterval=1.0,
        )
        window = Window()
        self.model.train()
        while self.step < config.max_train_steps and not self._must_stop(stop):
            for micro in range(accumulation):
                self._micro_step(next(batches), self.step * accumulation + micro, window)
            self.step += 1
            progress.update()
            is_saving = self._is_due(recipe.checkpoint.checkpointing_steps)
            is_last = self.step == config.max_train_steps
            if is_saving or is_last or self._is_due(recipe.logging.logging_steps):
                self._log(window, progress)
                window = Window()
            if is_saving:
                self.keeper.save(self.step)
            if self.step in recipe.checkpoint.pipeline_steps:
                self._keep_pipeline()
            if self._is_due(recipe.validation.validation_steps) and not is_last:
                self._validate()
        if window.micro_steps:
            self._log(window, progress)
        progress.close()

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _must_stop(self, stop: StopRequest) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.signum is not None
        # A signal may reach one process before another; all must leave at the same step.
        asked = torch.tensor([stop.signum or 0], device=self.accelerator.device)
        stop.signum = int(self.accelerator.gather(asked).max()) or None
        return stop.signum is not None

    def _micro_step(self, batch: dict[str, Tensor], index: int, window: Window) -> None:
        on_device = self.recipe.training.noise_on_device
        generator = step_generator(
            self.recipe.seed,
            index,
            self.accelerator.process_index,
            self.accelerator.device if on_device else "cpu",
        )
        clean, condition = self.task.data.prepare(batch, generator)
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast():
                loss, terms = self.task.objective(
                    self.model, self.models.teacher, clean, condition, generator
                )
            self.accelerator.backward(loss)
            self.task.objective.release()
            window.add({"loss": loss.detach(), **{f"loss_{k}": v for k, v in terms.items()}})
            if self.accelerator.sync_gradients:
                limit = self.recipe.training.max_grad_norm or math.inf
                window.gradient_norm = self.accelerator.clip_grad_norm_(
                    self.model.parameters(), limit
                )
            self.optimizer.step()
            if self.accelerator.sync_gradients and not self.optimizer.step_was_skipped:
                self.lr_scheduler.step()
                if self.ema is not None:
                    self.ema.step(self.trained)
            self.optimizer.zero_grad()

    def _log(self, window: Window, progress: tqdm) -> None:
        means = self.accelerator.reduce(window.means(), reduction="mean")
        row = {name: float(value) for name, value in means.items()}
        seconds = window.seconds()
        assert window.gradient_norm is not None
        norm = float(window.gradient_norm)
        # With float16 the scaler skips steps of infinite gradients; they are not a failure.
        is_norm_fatal = self.accelerator.mixed_precision != "fp16"
        if not math.isfinite(row["loss"]) or (is_norm_fatal and not math.isfinite(norm)):
            saved = list_checkpoints(self.output_dir)
            where = (
                f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
            )
            raise TrainingDiverged(
                f"loss {row['loss']}, gradient norm {norm} at step {self.step}; {where}"
            )
        images = window.micro_steps * self.recipe.training.train_batch_size
        row |= {
            "gradient_norm": norm,
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "images_per_second": round(images * self.accelerator.num_processes / seconds, 2),
        }
        self.accelerator.log(row, step=self.step)
        progress.set_postfix(loss=f"{row['loss']:.4f}", img_s=row["images_per_second"])
        if self.metrics is not None:
            self.metrics.write({"step": self.step, **row})

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Context in which the student has its averaged weights, if they are kept."""
        if self.ema is not None:
            self.ema.store(self.trained)
            self.ema.copy_to(self.trained)
        self.models.student.eval()
        try:
            yield
        finally:
            self.models.student.train()
            if self.ema is not None:
                self.ema.restore(self.trained)

    def _sample_grid(self, pipeline: DiffusionPipeline, name: str) -> None:
        if self.recipe.validation.num_validation_images:
            self.task.sample_grid(pipeline, self.output_dir / "samples" / f"{name}.png")

    def _validate(self) -> None:
        """A sample grid of the main process; sharded weights are only sampled at the end."""
        if not self.is_main or self.is_sharded:
            return
        with self._averaged_weights():
            pipeline = self.task.build_pipeline(self.models.student)
            self._sample_grid(pipeline, f"step-{self.step:07d}")

    def _keep_pipeline(self) -> None:
        """Saves the averaged model of this step beside the run's other results."""
        if self.is_main:
            with self._averaged_weights():
                pipeline = self.task.build_pipeline(self.models.student)
                self.task.save(
                    pipeline, self.output_dir / PIPELINE_AT_STEP.format(step=self.step), {}
                )
        self.accelerator.wait_for_everyone()

    def _finish(self) -> Path:
        """Saves the pipeline with the averaged weights, a last grid and the loss plot."""
        folder = self.output_dir / "pipeline"
        # Gathering sharded weights takes part of every process; DeepSpeed up to ZeRO-2 shards none.
        is_fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        state = self.accelerator.get_state_dict(self.model) if is_fsdp else None
        if self.is_main:
            student = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            if state is not None:
                student = type(student).from_config(student.config)
                student.load_state_dict(state)
            with self._averaged_weights():
                if not (trains_all(student) or has_lora(student)):
                    save_trained(student, student.state_dict(), self.output_dir)
                finish(student, self.output_dir)
                pipeline = self.task.build_pipeline(student)
                self._sample_grid(pipeline, "final")
                recipe = json.dumps(asdict(self.recipe), indent=1)
                self.task.save(pipeline, folder, {RECIPE_FILE: recipe})
            metrics = self.output_dir / "metrics.jsonl"
            plot_losses({self.output_dir.name: metrics}, self.output_dir / "loss.png")
        self.accelerator.wait_for_everyone()
        return folder
