"""The typed recipe of a training run; augmentation and optimiser fields bear timm's names."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionConfigFile, ArgumentParser


def _check(condition: bool, name: str, contract: str, value: object) -> None:
    if not condition:
        raise ValueError(f"`{name}` must {contract}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained.

    Args:
        name: of a model that timm knows, ours among them.
        args: further arguments of its constructor, e.g. ``{attn: inline, norm: prepbn}``.
        pretrained: folder to start from, as `best` and `last` of a run or of `lintra convert`;
            another image size or number of classes will do.
        grad_checkpointing: compute blocks again in the backward pass to save memory.
        compile: torch.compile the training step's model.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    grad_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and their augmentation.

    Args:
        source: `imagefolder` (a folder a class) or `npz` (arrays `images`, `labels`, or a pack of
            encoded images).
        train: folder or file to train on.
        val: folder or file to measure accuracy on; none measures nothing.
        batch_size: images a process and micro-step.
        val_batch_size: none is `batch_size`.
        workers: processes that read images.
        no_aug: resize and crop only.
        scale: range of the random crop's area, shares of the image.
        reprob: probability of random erasing.
        mixup: alpha of mixup, 0 switches it off.
        cutmix: alpha of CutMix, 0 switches it off.
        smoothing: label smoothing.
        interpolation: how images are resized.
        on_device: keep all training images of an `npz` on the device, decoded, and augment there by
            the batch: crop, flip and erasing only. For small images, where workers are the limit.
    """

    source: Literal["imagefolder", "npz"] = "imagefolder"
    train: str
    val: str | None = None
    batch_size: int = 128
    val_batch_size: int | None = None
    workers: int = 8
    no_aug: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    reprob: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    smoothing: float = 0.1
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    on_device: bool = False

    def __post_init__(self) -> None:
        _check(self.batch_size > 0, "data.batch_size", "be positive", self.batch_size)
        _check(self.workers >= 0, "data.workers", "not be negative", self.workers)
        low, high = self.scale
        _check(0 < low <= high <= 1, "data.scale", "rise within (0, 1]", self.scale)
        for name in ("reprob", "mixup_prob", "mixup_switch_prob", "smoothing", "hflip"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"data.{name}", "be in [0, 1]", value)
        if self.on_device:
            contract = "be {} with data.on_device"
            _check(self.source == "npz", "data.source", contract.format("npz"), self.source)
            augment = self.auto_augment
            _check(augment is None, "data.auto_augment", contract.format("null"), augment)
            jitter = self.color_jitter
            _check(jitter == 0, "data.color_jitter", contract.format("0"), jitter)
        mixes = self.mixup > 0 or self.cutmix > 0
        even = self.batch_size % 2 == 0
        _check(
            even or not mixes, "data.batch_size", "be even for mixup and CutMix", self.batch_size
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Epochs, optimiser and precision.

    The learning rate is ``base_lr * global batch / base_size``; `min_lr` and `warmup_lr` scale
    alike.

    Args:
        epochs: warm-up included, cool-down not.
        base_lr: learning rate at `base_size` images a step.
        base_size: images.
        warmup_epochs: linear rise from `warmup_lr`.
        cooldown_epochs: at `min_lr`, after `epochs`.
        clip_grad: gradients are scaled down to this norm; 0 does not clip.
        decay_tables: weight decay also for position tables other than DeiT's and Swin's, as in the
            authors' code.
        mixed_precision: none leaves the choice to `accelerate config`.
        max_steps: end after this many optimiser steps, for trials.
    """

    epochs: int = 300
    gradient_accumulation_steps: int = 1
    opt: str = "adamw"
    base_lr: float = 5e-4
    base_size: int = 512
    min_lr: float = 5e-6
    warmup_lr: float = 5e-7
    warmup_epochs: int = 20
    cooldown_epochs: int = 0
    sched: str = "cosine"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float = 5.0
    decay_tables: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "gradient_accumulation_steps", "base_size"):
            _check(getattr(self, name) > 0, f"training.{name}", "be positive", getattr(self, name))
        _check(self.base_lr > 0, "training.base_lr", "be positive", self.base_lr)
        _check(self.clip_grad >= 0, "training.clip_grad", "not be negative", self.clip_grad)
        warmup = self.warmup_epochs
        contract = f"be in [0, epochs = {self.epochs})"
        _check(0 <= warmup < self.epochs, "training.warmup_epochs", contract, warmup)
        steps = self.max_steps
        _check(steps is None or steps > 0, "training.max_steps", "be positive", steps)


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """PRepBN's schedule and the batch norms at the end; without effect on other norms.

    Args:
        fraction: share of all steps after which only RepBN is left.
        recalibration_passes: passes over the training images that measure batch norms anew.
    """

    fraction: float = 0.8
    recalibration_passes: int = 10

    def __post_init__(self) -> None:
        _check(0 <= self.fraction <= 1, "norm.fraction", "be in [0, 1]", self.fraction)
        passes = self.recalibration_passes
        _check(passes >= 0, "norm.recalibration_passes", "not be negative", passes)


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Exponential moving average of weights and statistics.

    Args:
        use_ema: whether to keep one.
        decay: a step.
    """

    use_ema: bool = False
    decay: float = 0.9999

    def __post_init__(self) -> None:
        _check(0 < self.decay < 1, "ema.decay", "be in (0, 1)", self.decay)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints `checkpoint-{step}`; `best` and `last` are folders that timm opens.

    Args:
        every_epochs: epochs between two; 0 saves none but the last on a signal.
        total_limit: the oldest beyond this number are removed; none keeps all.
        resume: a checkpoint folder, or `latest` (starts anew if there is none).
    """

    every_epochs: int = 1
    total_limit: int | None = 2
    resume: str | None = None

    def __post_init__(self) -> None:
        every, limit = self.every_epochs, self.total_limit
        _check(every >= 0, "checkpoint.every_epochs", "not be negative", every)
        _check(limit is None or limit > 0, "checkpoint.total_limit", "be positive", limit)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    Args:
        output_dir: folder of checkpoints, metrics and the trained model.
        logging_steps: optimiser steps between two rows of `metrics.jsonl`.
        val_epochs: epochs between two measurements of accuracy.
        seed: of weights, data order and augmentation.
    """

    output_dir: str
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging_steps: int = 50
    val_epochs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.logging_steps > 0, "logging_steps", "be positive", self.logging_steps)
        _check(self.val_epochs > 0, "val_epochs", "be positive", self.val_epochs)
        paths = {
            "data.train": self.data.train,
            "data.val": self.data.val,
            "model.pretrained": self.model.pretrained,
        }
        for name, path in paths.items():
            _check(path is None or Path(path).exists(), name, "exist", path)


def parse_recipe(arguments: Sequence[str], prog: str, description: str) -> Recipe:
    """Reads `--config recipe.yaml` and overrides such as `--training.base_lr 1e-3`.

    A wrong key, type, value or path ends the process with one line of explanation and code 2.
    """
    usage = "%(prog)s --config recipe.yaml [--group.field value ...]"
    parser = ArgumentParser(prog=prog, description=description, usage=usage)
    parser.add_argument("--config", action=ActionConfigFile, help="recipe, a YAML file")
    parser.add_class_arguments(Recipe)
    values = parser.parse_args(list(arguments))
    try:
        groups = vars(parser.instantiate_classes(values))
        return Recipe(**{name: value for name, value in groups.items() if name != "config"})
    except ValueError as error:
        parser.error(str(error))
