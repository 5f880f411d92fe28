"""The typed recipe of a training run; field names are those of the diffusers training scripts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser

from ..inheritance import POLICIES
from ..losses import check_loss_weights

T = TypeVar("T")

# Folder of the model that `checkpoint.pipeline_steps` keeps.
PIPELINE_AT_STEP = "pipeline-{step}"


def check_field(condition: bool, name: str, contract: str, value: object) -> None:
    """Raises ValueError "`name` must contract, got value" unless the condition holds."""
    if not condition:
        raise ValueError(f"`{name}` must {contract}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained, and from what.

    Args:
        kind: class of the trained transformer; `dit`, `flux`, `sd3` and `pixart` are those of
            diffusers, for teachers and controls.
        pretrained_teacher_model: pipeline folder of the teacher; none trains without one.
        pretrained_donor_model: pipeline folder of the model that the student inherits from, if not
            the teacher: the teacher at an earlier step (the donor's age in the paper's ablation),
            or a LiT of another resolution that goes on.
        pretrained_model_name_or_path: folder of the transformer, or of its pipeline, that an
            earlier stage of the same kind has trained; for CLEAR also a file of official weights.
        inherit: what the student takes of the donor's weights, a key of `POLICIES`; `none` takes
            only its configuration. A `dit` with `all` is the softmax control, trained on.
        config: constructor arguments of the transformer, on top of the donor's if there is one.
            The paper's ablations of a LiT are `num_linear_heads`, `linear_feature_map` (`relu`,
            `elu1`) and `conv_kernel_size` (0 for none). At another resolution: `sample_size` and
            `interpolation_scale`, see `LiTTransformer2DModel`.
        vae: folder of an AutoencoderKL; none takes that of the teacher's pipeline, or pixel space.
        trainable: what learns: `all`; `clear`, the attention projections that CLEAR trains; `lora`,
            low-rank updates of these. None is `clear` for CLEAR models and `all` for others.
        rank, lora_alpha: of `lora`; an alpha of none is the rank.
        master_weights: what learns is kept in float32 where the rest is in half precision.
        attention_layers: blocks whose attention outputs the attention terms compare, numbered as
            in `full_attention_layers`; none is the paper's choice, or all for attention_transfer.
    """

    kind: Literal[
        "dit", "lit", "flux", "clear_flux", "sd3", "clear_sd3", "pixart", "lit_pixart"
    ] = "lit"
    pretrained_teacher_model: str | None = None
    pretrained_donor_model: str | None = None
    pretrained_model_name_or_path: str | None = None
    inherit: str = "all_but_attention"
    config: dict[str, Any] = field(default_factory=dict)
    vae: str | None = None
    trainable: Literal["all", "clear", "lora"] | None = None
    rank: int = 64
    lora_alpha: int | None = None
    master_weights: bool = True
    attention_layers: list[int] | None = None

    @property
    def family(self) -> str:
        """`class`, `flux`, `sd3` or `pixart`."""
        return "class" if self.kind in ("dit", "lit") else self.kind.split("_")[-1]

    @property
    def is_clear(self) -> bool:
        return self.kind.startswith("clear_")

    @property
    def learns(self) -> str:
        """`trainable`, or what it stands for."""
        return self.trainable or ("clear" if self.is_clear else "all")

    @property
    def process(self) -> Literal["ddpm", "flow"]:
        """What the model predicts: noise or velocity."""
        return "ddpm" if self.family in ("class", "pixart") else "flow"

    def __post_init__(self) -> None:
        check_field(self.rank > 0, "model.rank", "be positive", self.rank)
        check_field(
            self.inherit in ("none", *POLICIES), "model.inherit", "name a policy", self.inherit
        )
        donor = self.pretrained_donor_model
        is_class = donor is None or self.family == "class"
        check_field(is_class, "model.pretrained_donor_model", f"be none for {self.kind}", donor)
        if self.pretrained_teacher_model is None and donor is None:
            is_all = self.inherit == "all"
            check_field(not is_all, "model.inherit", "not be all without a donor", self.inherit)
            check_field(
                bool(self.config), "model.config", "be given without a teacher", self.config
            )


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise schedule, by the names of diffusers' schedulers; the defaults are DiT's."""

    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        steps = self.num_train_timesteps
        check_field(steps > 1, "noise.num_train_timesteps", "be greater than 1", steps)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How FLUX and SD3 are trained, by the names of diffusers' training scripts.

    Args:
        shift: of the noise levels; none takes that of the teacher's scheduler, which is none for
            FLUX (whose shift belongs to sampling).
        weighting_scheme, logit_mean, logit_std, mode_scale: see `FlowProcess`.
        guidance_scale: what models with a guidance embedding are told, teacher and student.
    """

    shift: float | None = None
    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    guidance_scale: float = 3.5

    def __post_init__(self) -> None:
        check_field(self.shift is None or self.shift > 0, "flow.shift", "be positive", self.shift)
        check_field(self.logit_std > 0, "flow.logit_std", "be positive", self.logit_std)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are prepared.

    Args:
        source: `digits` (scikit-learn's), `imagefolder` (class folders) or `npz`; for text to
            image `prompt_cache`, which `lintra make-cache` has made. The cache has settled sizes,
            mirroring and latents: of the fields below, only the last three mean something to it.
        path: folder or file of the source.
        split: `train` or `test` of the digits; other sources have only `all`.
        resolution: side of the square images, pixels.
        channels: 1, 3, or none for what the source has.
        center_crop: crop the middle of the resized short side; otherwise squash.
        random_flip: mirror half of the images.
        image_interpolation_mode: how images are resized.
        latent_cache: folder of precomputed latents, made with the VAE on first use.
        in_memory: decode every image once, or read the whole prompt cache, into the memory of the
            device; for small data, whose reading would otherwise be what a fast GPU waits for.
        dataloader_num_workers: processes that read images.
        proportion_empty_prompts: share of prompts replaced by the empty one, for student and
            teacher alike.
    """

    source: Literal["digits", "imagefolder", "npz", "prompt_cache"] = "digits"
    path: str | None = None
    split: Literal["all", "train", "test"] = "all"
    resolution: int = 256
    channels: int | None = None
    center_crop: bool = True
    random_flip: bool = False
    image_interpolation_mode: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    dataloader_num_workers: int = 0
    latent_cache: str | None = None
    in_memory: bool = False
    proportion_empty_prompts: float = 0.0

    def __post_init__(self) -> None:
        share = self.proportion_empty_prompts
        check_field(0 <= share < 1, "data.proportion_empty_prompts", "be in [0, 1)", share)
        check_field(self.resolution > 0, "data.resolution", "be positive", self.resolution)
        check_field(self.channels in (None, 1, 3), "data.channels", "be 1 or 3", self.channels)
        both = self.in_memory and self.latent_cache is not None
        check_field(not both, "data.in_memory", "be false with a latent cache", self.in_memory)
        workers = self.dataloader_num_workers
        check_field(workers >= 0, "data.dataloader_num_workers", "not be negative", workers)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Steps, optimiser and precision.

    Args:
        max_train_steps: optimiser steps; 0 saves the student as it starts.
        train_batch_size: images a process and micro-step.
        class_dropout_prob: share of labels replaced by "no class", for student and teacher alike.
        mixed_precision: none leaves the choice to `accelerate config`.
        max_grad_norm: gradients are scaled down to this norm; 0 does not clip.
        noise_on_device: draw noise where the model runs: without waiting for the CPU, which is the
            limit of small models, but other numbers on other devices.
        compile_blocks: `torch.compile` the transformer blocks of student and teacher.
        optimizer: `adamw`; `prodigy` or `came` with pytorch_optimizer installed.
        optimizer_arguments: further arguments of the optimiser, by its own names.
    """

    max_train_steps: int
    train_batch_size: int
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "prodigy", "came"] = "adamw"
    optimizer_arguments: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-4
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "constant"
    lr_warmup_steps: int = 0
    lr_num_cycles: int = 1
    lr_power: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    allow_tf32: bool = False
    class_dropout_prob: float = 0.1
    noise_on_device: bool = False
    compile_blocks: bool = False

    def __post_init__(self) -> None:
        steps = self.max_train_steps
        check_field(steps >= 0, "training.max_train_steps", "not be negative", steps)
        for name in ("train_batch_size", "gradient_accumulation_steps"):
            check_field(
                getattr(self, name) > 0, f"training.{name}", "be positive", getattr(self, name)
            )
        check_field(
            self.learning_rate > 0, "training.learning_rate", "be positive", self.learning_rate
        )
        check_field(
            self.max_grad_norm >= 0, "training.max_grad_norm", "be >= 0", self.max_grad_norm
        )
        rate = self.class_dropout_prob
        check_field(0 <= rate < 1, "training.class_dropout_prob", "be in [0, 1)", rate)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints `checkpoint-{step}`.

    Args:
        checkpointing_steps: optimiser steps between two; 0 saves none but the last on a signal.
        checkpoints_total_limit: the oldest beyond this number are removed; none keeps all.
        resume_from_checkpoint: a checkpoint folder, or `latest` (starts anew if there is none).
        pipeline_steps: steps after which the averaged model is also kept as `pipeline-{step}`: as
            a donor of that age, or to be measured.
    """

    checkpointing_steps: int = 5000
    checkpoints_total_limit: int | None = 3
    resume_from_checkpoint: str | None = None
    pipeline_steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        positive = all(step > 0 for step in self.pipeline_steps)
        check_field(positive, "checkpoint.pipeline_steps", "be positive", self.pipeline_steps)
        steps, limit = self.checkpointing_steps, self.checkpoints_total_limit
        check_field(steps >= 0, "checkpoint.checkpointing_steps", "not be negative", steps)
        check_field(
            limit is None or limit > 0, "checkpoint.checkpoints_total_limit", "be > 0", limit
        )


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Exponential moving average of the weights, which is what is validated and saved."""

    use_ema: bool = True
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        check_field(0 < self.ema_decay < 1, "ema.ema_decay", "be in (0, 1)", self.ema_decay)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Sample grids during and after training.

    Args:
        validation_steps: optimiser steps between two; 0 only at the end.
        num_validation_images: images a grid, spread over the classes; 0 makes none.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance; 1 is none.
    """

    validation_steps: int = 0
    num_validation_images: int = 16
    num_inference_steps: int = 50
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("validation_steps", "num_validation_images"):
            value = getattr(self, name)
            check_field(value >= 0, f"validation.{name}", "not be negative", value)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """`metrics.jsonl` is always written; `report_to` adds a tracker of accelerate."""

    logging_steps: int = 50
    report_to: Literal["tensorboard"] | None = None
    tracker_project_name: str = "lintra"

    def __post_init__(self) -> None:
        check_field(
            self.logging_steps > 0, "logging.logging_steps", "be positive", self.logging_steps
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    Args:
        output_dir: folder of checkpoints, metrics, samples and the trained pipeline.
        loss: weight of each loss term, see `lintra.diffusion.losses.LOSS_TERMS`.
        seed: of weights, data order, noise and timesteps.
    """

    output_dir: str
    model: ModelConfig
    training: TrainingConfig
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: dict[str, float] = field(default_factory=lambda: {"noise": 1.0, "vlb": 1.0})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        has_teacher = self.model.pretrained_teacher_model is not None
        check_loss_weights(
            self.loss,
            has_teacher=has_teacher,
            has_variance=True,
            process=self.model.process,
            has_attention=self.model.is_clear,
        )
        is_text = self.model.family != "class"
        if is_text != (self.data.source == "prompt_cache"):
            must = "be prompt_cache" if is_text else "not be prompt_cache"
            check_field(False, "data.source", f"{must} for {self.model.kind}", self.data.source)
        paths = {
            "model.pretrained_teacher_model": self.model.pretrained_teacher_model,
            "model.pretrained_donor_model": self.model.pretrained_donor_model,
            "model.pretrained_model_name_or_path": self.model.pretrained_model_name_or_path,
            "model.vae": self.model.vae,
            "data.path": self.data.path,
        }
        for name, path in paths.items():
            check_field(path is None or Path(path).exists(), name, "exist", path)
        if self.data.source != "digits":
            check_field(
                self.data.path is not None, "data.path", f"be given for {self.data.source}", None
            )


def parse_config(cls: type[T], arguments: Sequence[str], prog: str, description: str) -> T:
    """Reads a dataclass from `--config file.yaml` and overrides such as `--group.field value`.

    A wrong key, type, value or path ends the process with one line of explanation and code 2.
    """
    usage = "%(prog)s --config recipe.yaml [--group.field value ...]"
    parser = ArgumentParser(prog=prog, description=description, usage=usage, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="recipe, a YAML file")
    parser.add_class_arguments(cls)
    values = parser.parse_args(list(arguments))
    try:
        groups = vars(parser.instantiate(values))
        return cls(**{name: value for name, value in groups.items() if name != "config"})
    except ValueError as error:
        parser.error(str(error))


def parse_recipe(arguments: Sequence[str], prog: str, description: str) -> Recipe:
    """`parse_config` of a recipe, e.g. with the override `--training.learning_rate 1e-4`."""
    return parse_config(Recipe, arguments, prog, description)
