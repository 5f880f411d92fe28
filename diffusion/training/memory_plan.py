"""How much memory the weights of a CLEAR distillation take, counted without making them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from ..models.transformer_clear_flux import ClearFluxTransformer2DModel
from .trainable import choose_trainable

GIB = 2**30
# Tensors as large as a parameter that an optimiser keeps for it.
STATES = {"adamw": 2, "prodigy": 4}
# What FLUX.1-dev sets differently from its class, as published.
FLUX_DEV: Mapping[str, Any] = {"guidance_embeds": True}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on each GPU of a run of `lintra distill`, without activations of one block.

    ``shared + trained + copies + gradients + states + checkpoints``, where

    - shared: the teacher's parameters in bfloat16, once; the student's frozen ones are the same
      memory;
    - trained: the student's own copies of what learns, or its low-rank updates;
    - copies: of what learns, in the other precision: bfloat16 that autocast makes of float32
      parameters, or float32 that DeepSpeed keeps of bfloat16 ones, a share on each GPU;
    - gradients and states: of what learns alone;
    - checkpoints: the inputs of all blocks, which gradient checkpointing keeps.

    Attributes:
        name: of the way of training.
        num_parameters: of the teacher.
        num_trained: numbers that learn.
    """

    name: str
    num_parameters: int
    num_trained: int
    shared: int
    trained: int
    copies: int
    gradients: int
    states: int
    checkpoints: int

    @property
    def total(self) -> int:
        parts = (self.shared, self.trained, self.copies, self.gradients, self.states)
        return sum(parts) + self.checkpoints


def memory_plan(
    config: Mapping[str, Any] = FLUX_DEV,
    *,
    trainable: str = "clear",
    rank: int = 64,
    optimizer: str = "adamw",
    master_weights: bool = True,
    zero2_gpus: int = 1,
    batch_size: int = 1,
    num_tokens: int = 4096 + 512,
) -> MemoryPlan:
    """Counts one way of distilling FLUX, on the meta device: no memory is taken.

    Args:
        config: of the transformer.
        trainable: `clear` or `lora`, see `choose_trainable`.
        rank: of the low-rank updates.
        optimizer: a key of `STATES`.
        master_weights: what learns is float32; otherwise bfloat16.
        zero2_gpus: GPUs among which DeepSpeed ZeRO-2 divides masters, gradients and states; 1 is
            no DeepSpeed.
        batch_size: samples a GPU.
        num_tokens: text and image tokens; 4608 at 1024 px.

    Raises:
        ValueError: an unknown optimiser.
    """
    if optimizer not in STATES:
        raise ValueError(f"`optimizer` must be one of {', '.join(STATES)}, got {optimizer!r}")
    with torch.device("meta"):
        teacher = FluxTransformer2DModel(**config)
        student = ClearFluxTransformer2DModel(**config)
    width = student.inner_dim
    num_blocks = student.config.num_layers + student.config.num_single_layers
    dtype = torch.float32 if master_weights else torch.bfloat16
    choose_trainable(student, trainable, dtype=dtype, rank=rank, lora_alpha=None)
    trained = [value for value in student.parameters() if value.requires_grad]
    count, size = sum(value.numel() for value in trained), dtype.itemsize
    is_zero = zero2_gpus > 1
    # ZeRO updates float32 masters, whatever the parameters are.
    state_size = torch.float32.itemsize if is_zero else size
    copies = 4 * count // zero2_gpus if is_zero else 2 * count if master_weights else 0
    mode = f"ZeRO-2 on {zero2_gpus} GPUs" if is_zero else "one GPU"
    what = f"LoRA of rank {rank}" if trainable == "lora" else "CLEAR's set"
    return MemoryPlan(
        name=f"{what}, {str(dtype).removeprefix('torch.')}, {optimizer}, {mode}",
        num_parameters=_count(teacher),
        num_trained=count,
        shared=2 * _count(teacher),
        trained=count * size,
        copies=copies,
        gradients=count * size // zero2_gpus,
        states=STATES[optimizer] * count * state_size // zero2_gpus,
        checkpoints=2 * prod((batch_size, num_tokens, width, num_blocks)),
    )


def _count(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def flux_plans() -> list[MemoryPlan]:
    """The ways of training that the recipes for FLUX.1-dev offer."""
    return [
        memory_plan(),
        memory_plan(master_weights=False),
        memory_plan(master_weights=False, optimizer="prodigy"),
        memory_plan(master_weights=False, optimizer="prodigy", zero2_gpus=4, batch_size=2),
        memory_plan(trainable="lora", batch_size=2),
        memory_plan(trainable="lora", rank=16),
    ]


def format_plans(plans: list[MemoryPlan]) -> str:
    """A Markdown table in GiB."""
    parts = ("shared", "trained", "copies", "gradients", "states", "checkpoints", "total")
    first = plans[0]
    lines = [
        f"{first.num_parameters / 1e9:.3f} B parameters, GiB on each GPU:",
        "",
        f"| what learns, its dtype, optimiser | numbers (B) | {' | '.join(parts)} |",
        f"| --- | {' | '.join(['---:'] * (len(parts) + 1))} |",
    ]
    for plan in plans:
        values = " | ".join(f"{getattr(plan, part) / GIB:.1f}" for part in parts)
        lines.append(f"| {plan.name} | {plan.num_trained / 1e9:.3f} | {values} |")
    return "\n".join(lines)
