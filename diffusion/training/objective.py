"""From clean latents to a loss: one noised input and one condition for student and teacher."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..ddpm import DDPMProcess
from ..flow import FlowProcess
from ..losses import Predictions, compares_attention, forces_attention, weighted_loss
from .attention_outputs import AttentionOutputs
from .families import Condition, Family


def disable_internal_label_dropout(model: nn.Module) -> None:
    """Turns off the label dropout that each diffusers block draws for itself in training mode.

    Labels are dropped once, outside, so that all blocks, the student and the teacher agree.
    """
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


class Objective:
    """Noises a batch, asks student and teacher, and weighs the loss terms.

    Args:
        family: how the models are called.
        process: noising process.
        weights: weight of each loss term by name.
        dropout_prob: share of samples whose condition is replaced by `unconditional`.
        unconditional: tensors of the condition of nothing, without a row dimension.
        attention: recorders of student and teacher, for the terms that compare attention.
    """

    def __init__(
        self,
        family: Family,
        process: DDPMProcess | FlowProcess,
        weights: Mapping[str, float],
        *,
        dropout_prob: float,
        unconditional: Condition,
        attention: tuple[AttentionOutputs, AttentionOutputs] | None = None,
    ):
        self.family = family
        self.process = process
        self.weights = weights
        self.dropout_prob = dropout_prob
        self.unconditional = unconditional
        self.attention = attention if compares_attention(weights) else None
        self.is_forced = forces_attention(weights)

    def _drop(self, condition: Condition, dropped: Tensor) -> dict[str, Tensor]:
        kept = dict(condition)
        for name, nothing in self.unconditional.items():
            value = condition[name]
            rows = dropped.view(-1, *[1] * (value.ndim - 1))
            kept[name] = torch.where(rows, nothing.to(value.device, value.dtype), value)
        return kept

    def release(self) -> None:
        """Lets go of what a call has left for the backward pass, which must be over."""
        for outputs in self.attention or ():
            outputs.release()

    def __call__(
        self,
        student: nn.Module,
        teacher: ModelMixin | None,
        clean: Tensor,
        condition: Condition,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and unweighted terms of one micro-batch.

        Args:
            student: called by the family.
            teacher: called alike without gradient; None if no term needs it.
            clean: latents or images x_0, ``(B, C, H, W)`` float32.
            condition: tensors with a row a sample.
            generator: of all draws; one on the CPU draws the same numbers for every device.
        """
        device, count, drawing = clean.device, len(clean), generator.device
        noise = torch.randn(clean.shape, generator=generator, device=drawing).to(device)
        timestep = self.process.draw(count, generator)
        chance = torch.rand((count,), generator=generator, device=drawing)
        dropped = chance < self.dropout_prob
        timestep = timestep.to(device)
        condition = self._drop(condition, dropped.to(device))
        noised = self.process.add_noise(clean, noise, timestep)

        mine, theirs = self.attention or (None, None)
        target = None
        if teacher is not None:
            with torch.no_grad(), theirs.recording() if theirs else nullcontext():
                target = self.family(teacher, noised, timestep, condition)
        replacements = theirs if self.is_forced else None
        with mine.recording(replacements) if mine else nullcontext():
            prediction = self.family(student, noised, timestep, condition)
        pairs = zip(mine.taken(), theirs.taken(), strict=True) if mine and theirs else ()
        return weighted_loss(
            self.weights,
            Predictions(
                process=self.process,
                clean=clean,
                noise=noise,
                noised=noised,
                timestep=timestep,
                student=prediction,
                teacher=target,
                weighting=self.process.weighting(timestep),
                attention=tuple(pairs),
            ),
        )
