"""From clean latents to a loss: one noised input and one condition for student and teacher."""

from collections.abc import Mapping

import torch
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..ddpm import DDPMProcess
from ..losses import Predictions, weighted_loss


def disable_internal_label_dropout(model: nn.Module) -> None:
    """Turns off the label dropout that each diffusers block draws for itself in training mode.

    Labels are dropped once, outside, so that all blocks, the student and the teacher agree.
    """
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


class DDPMObjective:
    """Noises a batch, asks student and teacher, and weighs the loss terms.

    Args:
        process: noising process.
        weights: weight of each loss term by name.
        class_dropout_prob: share of labels replaced by `null_label`.
        null_label: the label of "no class".
    """

    def __init__(
        self,
        process: DDPMProcess,
        weights: Mapping[str, float],
        *,
        class_dropout_prob: float,
        null_label: int,
    ):
        self.process = process
        self.weights = weights
        self.class_dropout_prob = class_dropout_prob
        self.null_label = null_label

    def __call__(
        self,
        student: nn.Module,
        teacher: ModelMixin | None,
        clean: Tensor,
        labels: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and unweighted terms of one micro-batch.

        Args:
            student: called as ``student(x_t, timestep=t, class_labels=y)``.
            teacher: called alike without gradient; None if no term needs it.
            clean: latents or images x_0, ``(B, C, H, W)`` float32.
            labels: ``(B,)`` int64.
            generator: of all draws; one on the CPU draws the same numbers for every device.
        """
        device, drawing = clean.device, generator.device
        noise = torch.randn(clean.shape, generator=generator, device=drawing).to(device)
        steps = self.process.num_steps
        timestep = torch.randint(steps, labels.shape, generator=generator, device=drawing)
        chance = torch.rand(labels.shape, generator=generator, device=drawing)
        dropped = chance < self.class_dropout_prob
        timestep = timestep.to(device)
        labels = torch.where(dropped.to(device), self.null_label, labels)
        noised = self.process.add_noise(clean, noise, timestep)

        prediction = student(noised, timestep=timestep, class_labels=labels, return_dict=False)[0]
        target = None
        if teacher is not None:
            with torch.no_grad():
                target = teacher(
                    noised.to(teacher.dtype),
                    timestep=timestep,
                    class_labels=labels,
                    return_dict=False,
                )[0]
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
            ),
        )
