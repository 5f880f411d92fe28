"""What of a teacher's weights a student takes (weight inheritance of LiT, arXiv:2501.12976)."""

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .attention.linear import LiTAttention

logger = logging.getLogger(__name__)

# policy -> beginnings of the names, within a self-attention layer, of what is inherited
POLICIES: dict[str, tuple[str, ...]] = {
    "all_but_attention": (),  # the paper's, class-conditional
    "with_q": ("to_q",),
    "with_v": ("to_v",),
    "with_kv": ("to_k", "to_v"),
    "with_qkv": ("to_q", "to_k", "to_v"),
    "with_out": ("to_out",),  # text to image
    "with_projections": ("to_q", "to_k", "to_v", "to_out"),
    "all": ("",),  # the convolution too: to go on with a model, e.g. at a higher resolution
}

# Configuration in which student and teacher may differ: no inherited tensor depends on it, or (for
# the additional conditions of PixArt) the tensors themselves tell.
_FREE_CONFIG = {
    "dropout",
    "interpolation_scale",
    "sample_size",
    "upcast_attention",
    "use_additional_conditions",
}
# What a teacher whose configuration lacks an entry was built with.
_TEACHER_DEFAULTS = {"time_freq_shift": 1.0}


@dataclass(frozen=True)
class InheritanceReport:
    """Names and shapes of the tensors that a student took, kept as initialised, or left behind.

    Attributes:
        policy: the policy that was applied.
        inherited: student tensors copied from the teacher.
        initialized: student tensors that keep their own initialisation.
        left_out: teacher tensors that the student did not take.
    """

    policy: str
    inherited: dict[str, tuple[int, ...]]
    initialized: dict[str, tuple[int, ...]]
    left_out: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        lines = [f"inheritance, policy {self.policy}:"]
        for title in ("inherited", "initialized", "left_out"):
            tensors = getattr(self, title)
            numbers = sum(torch.Size(shape).numel() for shape in tensors.values())
            lines.append(f"  {title}: {len(tensors)} tensors, {numbers:,} numbers")
            if title != "inherited":
                lines += [f"    {name} {shape}" for name, shape in _merge_blocks(tensors).items()]
        return "\n".join(lines)


def _merge_blocks(tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """One line for the tensors that every block has: `blocks.*.x` instead of 28 names."""
    merged = {}
    for name, shape in tensors.items():
        merged[".".join("*" if part.isdigit() else part for part in name.split("."))] = shape
    return merged


def linear_attention_names(model: nn.Module) -> list[str]:
    """Names of the linear attention modules of `model`."""
    return [name for name, module in model.named_modules() if isinstance(module, LiTAttention)]


def self_attention_names(model: nn.Module) -> list[str]:
    """Names of the self-attention modules, linear or softmax: diffusers calls them `attn1`."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "attn1"]


def student_config(
    cls: type[ModelMixin], teacher: ModelMixin | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Constructor arguments of a `cls` that matches the teacher, if any, with `overrides` on top.

    Raises:
        ValueError: an override that `cls` does not know, or the teacher has an argument it lacks.
    """
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    if unknown := set(overrides) - known:
        raise ValueError(f"`overrides` must be arguments of {cls.__name__}, got {sorted(unknown)}")
    config = {} if teacher is None else dict(teacher.config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if unknown := set(config) - known:
        raise ValueError(
            f"`teacher` must have a configuration that {cls.__name__} takes, got also"
            f" {sorted(unknown)} in a {type(teacher).__name__}"
        )
    return config | overrides


def _check_configs_fit(student: ModelMixin, teacher: ModelMixin, policy: str) -> None:
    # A student that takes all goes on as the same function, so its attention must be the same.
    attention = () if policy == "all" else ("linear_", "num_linear_", "conv_")
    differing = [
        f"{key} {student.config[key]} != {value}"
        for key, value in (_TEACHER_DEFAULTS | dict(teacher.config)).items()
        if not key.startswith(("_", *attention))
        and key in student.config
        and key not in _FREE_CONFIG
        and student.config[key] != value
    ]
    if differing:
        raise ValueError(
            f"`teacher` must fit the student, but (student != teacher) {'; '.join(differing)}"
        )


@torch.no_grad()
def inherit_weights(
    student: ModelMixin, teacher: ModelMixin, policy: str = "all_but_attention"
) -> InheritanceReport:
    """Copies the teacher's weights into the student, in place.

    The student's self-attention layers take nothing (``all_but_attention``, the paper's policy),
    the projections that `POLICIES` lists, or all; every other tensor, cross-attention included,
    must be in the teacher with the same shape. A softmax student is the control of an experiment:
    it takes all and trains on, or learns its attention anew.

    Args:
        student: a model of diffusers' transformer blocks, with linear or softmax self-attention.
        teacher: the model it derives from, e.g. a `DiTTransformer2DModel`.
        policy: a key of `POLICIES`.

    Returns:
        What was inherited, initialised and left out, with shapes.

    Raises:
        ValueError: an unknown policy, configurations that do not fit, a student without
            transformer blocks, a tensor that the policy asks for but the teacher lacks or has in
            another shape, a teacher tensor outside the attention that has no place in the student.
            The student is then unchanged.
    """
    if policy not in POLICIES:
        raise ValueError(f"`policy` must be one of {', '.join(POLICIES)}, got {policy!r}")
    attention = self_attention_names(student)
    if not attention:
        raise ValueError(f"`student` must have transformer blocks, got a {type(student).__name__}")
    _check_configs_fit(student, teacher, policy)

    def layer_of(name: str) -> str | None:
        return next((layer for layer in attention if name.startswith(f"{layer}.")), None)

    def is_wanted(name: str) -> bool:
        layer = layer_of(name)
        return layer is None or name.removeprefix(f"{layer}.").startswith(POLICIES[policy])

    mine, theirs = student.state_dict(), teacher.state_dict()
    wanted = [name for name in mine if is_wanted(name)]
    problems = [f"the teacher lacks {name}" for name in wanted if name not in theirs]
    problems += [
        f"{name} is {tuple(mine[name].shape)} here, {tuple(theirs[name].shape)} in the teacher"
        for name in wanted
        if name in theirs and mine[name].shape != theirs[name].shape
    ]
    problems += [
        f"the student has no place for {name}"
        for name in theirs
        if name not in mine and layer_of(name) is None
    ]
    if problems:
        raise ValueError("`teacher` must hold what the student inherits: " + "; ".join(problems))

    for name in wanted:
        mine[name].copy_(theirs[name])
    report = InheritanceReport(
        policy=policy,
        inherited={name: tuple(mine[name].shape) for name in wanted},
        initialized={n: tuple(t.shape) for n, t in mine.items() if n not in set(wanted)},
        left_out={n: tuple(t.shape) for n, t in theirs.items() if n not in set(wanted)},
    )
    logger.info("%s", report)
    return report
