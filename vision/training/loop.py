"""The training loop of the backbones: timm's parts under accelerate, resumable to the digit."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.building import save_backbone
from ..schedule import PRepBNSchedule, recalibrate_batchnorm
from .config import Recipe
from .data import make_loader, open_images, seed_everything
from .device_data import DeviceBatches
from .records import (
    MetricsFile,
    StopRequest,
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint is untouched."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        step: optimiser steps done.
        accuracy: the best top-1 accuracy, None if there is no validation data.
        folder: the trained model for timm, None if a signal stopped the run.
        checkpoint: folder that a stopped run resumes from, None if it is complete.
        signum: the signal that stopped the run, None if it is complete.
    """

    step: int
    accuracy: float | None
    folder: Path | None
    checkpoint: Path | None
    signum: int | None


def _weights(folder: str) -> dict[str, Any]:
    """The entries of a pretrained_cfg that point at a folder's weights."""
    file = Path(folder) / "model.safetensors"
    try:
        config = json.loads((file.parent / "config.json").read_text())
        num_classes = config["num_classes"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"`model.pretrained` must be a folder as `best` of a run, got {folder!r}: {error}"
        ) from error
    return {"file": str(file), "num_classes": num_classes}


def create_backbone(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's model.

    Raises:
        ValueError: a name that timm does not know, or arguments that the model refuses.
    """
    config = recipe.model
    if not timm.is_model(config.name):
        raise ValueError(f"`model.name` must be a model of timm or lintra, got {config.name!r}")
    arguments = {"num_classes": num_classes, **config.args}
    if config.pretrained is not None:
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": _weights(config.pretrained)}
    try:
        model = timm.create_model(config.name, **arguments)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"`model.args` must fit {config.name}, got {config.args}: {error}"
        ) from error
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


class BackboneTrainer:
    """One run of a recipe: `BackboneTrainer(recipe).run()`.

    What a recipe can get wrong raises ValueError in the constructor.

    Args:
        recipe: the run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        resume = resolve_checkpoint(recipe.checkpoint.resume, self.folder)
        data, config = recipe.data, recipe.training
        train_images = open_images(data.source, data.train)
        num_classes = train_images.num_classes
        seed_everything(recipe.seed)
        self.network = create_backbone(recipe, num_classes)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
        self.is_main = self.accelerator.is_main_process
        loader: Any
        if data.on_device:
            loader = DeviceBatches(
                train_images,
                data,
                self.network,
                seed=recipe.seed,
                device=self.accelerator.device,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
            )
        else:
            loader = make_loader(
                train_images, data, self.network, is_training=True, seed=recipe.seed
            )
        val_loader = None
        if data.val is not None:
            val_images = open_images(data.source, data.val)
            if val_images.num_classes != num_classes:
                raise ValueError(
                    f"`data.val` must have the {num_classes} classes of data.train,"
                    f" got {val_images.num_classes}"
                )
            val_loader = make_loader(val_images, data, self.network, is_training=False)
        self.mixup = None
        if data.mixup > 0 or data.cutmix > 0:
            self.mixup = Mixup(
                data.mixup,
                data.cutmix,
                prob=data.mixup_prob,
                switch_prob=data.mixup_switch_prob,
                label_smoothing=data.smoothing,
                num_classes=num_classes,
            )
        self._prepare(loader, val_loader)
        self.epoch, self.step, self.micro_steps_done = 0, 0, 0
        self.best: float | None = None
        self.validated_step = 0
        if resume is not None:
            state = load_checkpoint(self.accelerator, resume)
            self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
            self.micro_steps_done = state["micro_steps_done"]

    def _prepare(self, loader: Any, val_loader: Any) -> None:
        config, accelerator = self.recipe.training, self.accelerator
        accumulation = config.gradient_accumulation_steps
        batch = self.recipe.data.batch_size * accelerator.num_processes * accumulation
        factor = batch / config.base_size
        self.network.to(accelerator.device)
        optimizer = create_optimizer_v2(
            self._parameters(),
            opt=config.opt,
            lr=config.base_lr * factor,
            weight_decay=config.weight_decay,
            betas=config.betas,
            eps=config.eps,
        )
        self.ema: ModelEmaV3 | None = None
        if self.recipe.ema.use_ema:
            self.ema = ModelEmaV3(self.network, decay=self.recipe.ema.decay)
            accelerator.register_for_checkpointing(self.ema)
        model = torch.compile(self.network) if self.recipe.model.compile else self.network
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        self.val_loader: Any = None
        if val_loader is not None:
            self.val_loader = accelerator.prepare(val_loader)
        self.steps_per_epoch = len(self.loader) // accumulation
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"`data.train` must hold at least one step of {batch} images,"
                f" got {len(self.loader.dataset)}"
            )
        self.num_epochs = config.epochs + config.cooldown_epochs
        self.total_steps = self.num_epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            min_lr=config.min_lr * factor,
            warmup_lr=config.warmup_lr * factor,
            warmup_epochs=config.warmup_epochs,
            cooldown_epochs=config.cooldown_epochs,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        self.mixing = PRepBNSchedule(
            self.network,
            self.total_steps,
            fraction=self.recipe.norm.fraction,
            accumulation_steps=accumulation,
        )
        accelerator.register_for_checkpointing(self.mixing)

    def _parameters(self) -> list[dict[str, Any]]:
        """Groups with and without weight decay."""
        no_weight_decay: Any = getattr(self.network, "no_weight_decay", set)
        free = set(no_weight_decay())
        if self.recipe.training.decay_tables:
            tables = (".positional_encoding", ".pos_embed")
            free = {name for name in free if not name.endswith(tables)}
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups[parameter.ndim > 1 and name not in free].append(parameter)
        return [
            {"params": groups[True]},
            {"params": groups[False], "weight_decay": 0.0},
        ]

    def run(self) -> TrainingResult:
        """Trains to the end, or until SIGINT or SIGTERM, which leave a checkpoint.

        Raises:
            TrainingDiverged: the loss is no longer finite.
        """
        self.metrics: MetricsFile | None = None
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.step)
        with StopRequest() as stop:
            while self.epoch < self.num_epochs and self.step < self.total_steps:
                self._train_epoch(stop)
                if stop.signum is not None:
                    return TrainingResult(self.step, self.best, None, self._save(), stop.signum)
                self.epoch, self.micro_steps_done = self.epoch + 1, 0
                if self.epoch % self.recipe.val_epochs == 0:
                    self._validate()
                every = self.recipe.checkpoint.every_epochs
                if every and self.epoch % every == 0:
                    self._save()
        return self._finish()

    def _save(self) -> Path:
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "micro_steps_done": self.micro_steps_done,
            "best": self.best,
        }
        limit = self.recipe.checkpoint.total_limit
        return save_checkpoint(self.accelerator, self.folder, state, limit)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.mixup is None:
            logits = self.model(images)
            return F.cross_entropy(
                logits.float(), labels, label_smoothing=self.recipe.data.smoothing
            )
        images, targets = self.mixup(images, labels)
        return F.cross_entropy(self.model(images).float(), targets)

    def _train_epoch(self, stop: StopRequest) -> None:
        """One epoch, or what is left of it after a resume."""
        # Order, augmentation and what a step draws depend on seed, epoch and index alone, so that
        # a resumed run sees the same.
        seed_everything(self.recipe.seed, self.epoch)
        self.loader.dataset.epoch = self.epoch
        self.model.train()
        accumulation = self.recipe.training.gradient_accumulation_steps
        usable = self.steps_per_epoch * accumulation
        window, started, losses = 0, time.perf_counter(), torch.zeros((), device=self.device)
        for index, (images, labels) in enumerate(self.loader):
            if index >= usable or self.step >= self.total_steps:
                break
            if index < self.micro_steps_done:
                continue
            rank = self.accelerator.process_index
            seed_everything(self.recipe.seed, self.epoch, index, rank, 1)
            with self.accelerator.accumulate(self.model):
                loss = self._loss(images, labels)
                self.accelerator.backward(loss)
                norm = self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses += loss.detach()
            window += 1
            self.micro_steps_done = index + 1
            if (index + 1) % accumulation != 0:
                continue
            self._advance()
            if self.step % self.recipe.logging_steps == 0 or self.step == self.total_steps:
                self._log(losses / window, norm, window, time.perf_counter() - started)
                window, started = 0, time.perf_counter()
                losses.zero_()
            if stop.signum is not None:
                return

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def _clip(self) -> Tensor | None:
        limit = self.recipe.training.clip_grad
        if not limit or not self.accelerator.sync_gradients:
            return None
        return self.accelerator.clip_grad_norm_(self.model.parameters(), limit)

    def _advance(self) -> None:
        """Everything that moves once an optimiser step."""
        self.step += 1
        self.scheduler.step_update(self.step)
        self.mixing.step()
        if self.ema is not None:
            self.ema.update(self.network, step=self.step)

    def _log(self, loss: Tensor, norm: Tensor | None, micro_steps: int, seconds: float) -> None:
        mean = float(self.accelerator.reduce(loss, reduction="mean"))
        if not math.isfinite(mean):
            raise TrainingDiverged(f"loss {mean} at step {self.step}")
        images = micro_steps * self.recipe.data.batch_size * self.accelerator.num_processes
        self._write(
            loss=mean,
            gradient_norm=None if norm is None else float(norm),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            mix=self.mixing.mix if self.mixing.norms else None,
            images_per_second=round(images / seconds, 2),
        )

    def _write(self, **row: Any) -> None:
        if self.metrics is not None:
            self.metrics.write({"step": self.step, "epoch": self.epoch, **row})

    @torch.no_grad()
    def _accuracy(self, network: nn.Module) -> float:
        """Top-1 accuracy on the validation images, each counted once, in percent."""
        was_training = network.training
        network.eval()
        right = count = 0
        for images, labels in self.val_loader:
            with self.accelerator.autocast():
                hits = (network(images).argmax(-1) == labels).long()
            hits = self.accelerator.gather_for_metrics(hits)
            right, count = right + int(hits.sum()), count + len(hits)
        network.train(was_training)
        return 100 * right / count

    def _validate(self) -> None:
        if self.val_loader is None or self.validated_step == self.step:
            return
        self.validated_step = self.step
        row = {"accuracy": self._accuracy(self.network)}
        network = self.network
        if self.ema is not None:
            row["accuracy_ema"] = self._accuracy(self.ema.module)
            network = self.ema.module
        self._write(**row)
        self._keep_best(network, max(row.values()) if self.ema is None else row["accuracy_ema"])

    def _keep_best(self, network: nn.Module, accuracy: float) -> None:
        if self.best is not None and accuracy <= self.best:
            return
        self.best = accuracy
        self._export(network, "best")

    def _export(self, network: nn.Module, name: str) -> Path:
        if self.is_main:
            save_backbone(network, self.folder / name, self.recipe.model.args)
        self.accelerator.wait_for_everyone()
        return self.folder / name

    def _finish(self) -> TrainingResult:
        """Recalibrates batch norms, measures once more, and saves the last model."""
        self._validate()
        network = self.network if self.ema is None else self.ema.module
        passes = self.recipe.norm.recalibration_passes
        if passes and any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()
        ):
            seed_everything(self.recipe.seed)
            with self.accelerator.autocast():
                recalibrate_batchnorm(network, self.loader, passes=passes)
            if self.val_loader is not None:
                accuracy = self._accuracy(network)
                self._write(accuracy_recalibrated=accuracy)
                self._keep_best(network, accuracy)
        folder = self._export(network.eval(), "last")
        return TrainingResult(self.step, self.best, folder, None, None)
