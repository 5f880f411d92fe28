"""A few steps of a CLEAR distillation with random weights, to measure the memory plan."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from ..flow import FlowProcess
from ..models.transformer_clear_flux import ClearFluxTransformer2DModel
from .attention_outputs import AttentionOutputs
from .config import TrainingConfig
from .families import FluxFamily, attention_layer_names
from .memory_plan import FLUX_DEV, GIB, MemoryPlan, memory_plan
from .objective import Objective
from .optimizers import make_optimizer
from .trainable import choose_trainable

CLEAR_LOSS = {"flow": 1.0, "output_distillation": 0.5, "attention_distillation": 0.05}
_NUM_STEPS = 2  # the second has the optimiser's states from its beginning


@dataclass(frozen=True)
class Measurement:
    """What a run took.

    Attributes:
        plan: what it was expected to take.
        peak: bytes that PyTorch had allocated at most; 0 without CUDA.
        seconds: of the last step.
        loss: of the last step.
    """

    plan: MemoryPlan
    peak: int
    seconds: float
    loss: float

    def __str__(self) -> str:
        return (
            f"{self.plan.name}: peak {self.peak / GIB:.1f} GiB, plan {self.plan.total / GIB:.1f}"
            f" GiB without the activations of a block, {self.seconds:.2f} s a step"
        )


def measure_step(
    config: Mapping[str, Any] = FLUX_DEV,
    *,
    device: torch.device | str,
    trainable: str = "clear",
    rank: int = 64,
    master_weights: bool = True,
    radius: float = 16,
    side: int = 128,
    num_text: int = 512,
    batch_size: int = 1,
) -> Measurement:
    """Trains a FLUX of random weights for two steps, as the loop does it on one device.

    Args:
        config: of the transformer.
        device: where it runs.
        trainable, rank, master_weights, batch_size: as of `memory_plan`, with AdamW.
        radius: of the student.
        side: of the square latents; 128 at 1024 px.
        num_text: text tokens.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    teacher = _random_teacher(config, device)
    student = ClearFluxTransformer2DModel.from_teacher(teacher, radius=radius)
    dtype = torch.float32 if master_weights else torch.bfloat16
    choose_trainable(student, trainable, dtype=dtype, rank=rank, lora_alpha=None)
    student.train().enable_gradient_checkpointing()
    training = TrainingConfig(max_train_steps=_NUM_STEPS, train_batch_size=batch_size)
    learns = [value for value in student.parameters() if value.requires_grad]
    optimizer = make_optimizer(learns, training)
    names = attention_layer_names(student, None)
    objective = Objective(
        FluxFamily(student.config, guidance_scale=3.5),
        FlowProcess(),
        CLEAR_LOSS,
        dropout_prob=0.0,
        unconditional={},
        attention=(AttentionOutputs(student, names), AttentionOutputs(teacher, names)),
    )
    channels = student.config.in_channels // 4
    clean = torch.randn(batch_size, channels, side, side, device=device)
    sizes = {
        "prompt_embeds": (num_text, student.config.joint_attention_dim),
        "pooled_prompt_embeds": (student.config.pooled_projection_dim,),
    }
    condition = {
        name: torch.randn(batch_size, *size, device=device, dtype=torch.bfloat16)
        for name, size in sizes.items()
    }
    generator = torch.Generator().manual_seed(0)
    for _ in range(_NUM_STEPS):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = objective(student, teacher, clean, condition, generator)
        loss.backward()
        objective.release()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()  # waits for the device
    return Measurement(
        plan=memory_plan(
            config,
            trainable=trainable,
            rank=rank,
            master_weights=master_weights,
            batch_size=batch_size,
            num_tokens=(side // 2) ** 2 + num_text,
        ),
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        seconds=time.perf_counter() - started,
        loss=value,
    )


@torch.no_grad()
def _random_teacher(config: Mapping[str, Any], device: torch.device) -> FluxTransformer2DModel:
    """In bfloat16 from the first moment: in float32 it would not fit beside anything."""
    with torch.device("meta"):
        teacher = FluxTransformer2DModel(**config).to(torch.bfloat16)
    teacher.to_empty(device=device)
    torch.manual_seed(0)
    for value in teacher.parameters():
        value.fill_(1.0) if value.ndim == 1 else value.normal_(std=0.02)
    return teacher.eval().requires_grad_(False)
