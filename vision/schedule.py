"""What happens to RepBN and PRepBN from outside: the mixing schedule and recalibration."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .norm import PRepBN, RepBN


class PRepBNSchedule:
    """Lets the LayerNorm share of every PRepBN fall linearly from 1 to 0.

    ``mix = max(0, 1 - step / T)`` with ``T = round(fraction * total_steps)`` optimiser steps, read
    before the step is counted: 1, (T - 1) / T, ..., 1 / T, 0, 0, ... Guo et al. 2024
    (arXiv:2405.11582), Eq. 3. The authors used 0.16 to 0.8 of all steps; too short a fall may
    diverge.

    Call `step` once after every optimiser step, never once a micro-batch. To resume, save
    `state_dict` beside the model.

    Args:
        model: holds the norms; wrapped or compiled models will do.
        total_steps: optimiser steps of the whole training.
        fraction: share of them after which only RepBN is left.
        warmup_steps: steps before the fall in which only LayerNorm is evaluated.
        accumulation_steps: micro-batches an optimiser step; their running statistics then decay
            together as much as those of one batch.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        fraction: float = 0.8,
        warmup_steps: int = 0,
        accumulation_steps: int = 1,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"`total_steps` must be positive, got {total_steps}")
        if not 0 <= fraction <= 1:
            raise ValueError(f"`fraction` must be in [0, 1], got {fraction}")
        if warmup_steps < 0:
            raise ValueError(f"`warmup_steps` must not be negative, got {warmup_steps}")
        if accumulation_steps < 1:
            raise ValueError(f"`accumulation_steps` must be positive, got {accumulation_steps}")
        self.norms = [module for module in model.modules() if isinstance(module, PRepBN)]
        self.warmup_steps = warmup_steps
        self.fall_steps = round(fraction * total_steps)
        self.steps_done = 0
        for module in model.modules():
            if isinstance(module, RepBN):
                # k updates with momentum m' keep (1 - m')^k = 1 - m of the old statistics.
                module.bn.momentum = 1 - (1 - module.momentum) ** (1 / accumulation_steps)
        self._set()

    @property
    def mix(self) -> float:
        """The share of LayerNorm in the next step."""
        fallen = self.steps_done - self.warmup_steps
        if fallen < 0:
            return 1.0
        return max(0.0, 1 - fallen / self.fall_steps) if self.fall_steps else 0.0

    def _set(self) -> None:
        for norm in self.norms:
            norm.set_mix(self.mix, use_repbn=self.steps_done >= self.warmup_steps)

    def step(self) -> None:
        """Counts one optimiser step."""
        self.steps_done += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_done = int(state["steps_done"])
        self._set()


def _images(batch: Any) -> Tensor:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, loader: Iterable[Any], *, passes: int = 1) -> nn.Module:
    """Measures the running statistics of every batch norm anew, with all else in evaluation mode.

    Drop path and dropout shift the statistics that training collects; the authors of SLAB
    (arXiv:2405.11582) end their training with such passes over the training images. Statistics are
    plain means over all batches; with torch.distributed they are averaged over the processes.

    Args:
        model: changed in place; its training flags come back as they were.
        loader: yields image batches, or tuples that begin with one; iterated `passes` times.
        passes: times the loader is read.

    Returns:
        The model.

    Raises:
        ValueError: the loader is empty.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return model
    flags = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        norm.train()
    count = 0
    try:
        for _ in range(passes):
            for batch in loader:
                model(_images(batch).to(device))
                count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in flags.items():
            module.training = training
    if count == 0:
        raise ValueError("`loader` must yield at least one batch, got none")
    _average_over_processes(norms)
    return model


def _average_over_processes(norms: list[nn.modules.batchnorm._BatchNorm]) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    for norm in norms:
        for statistic in (norm.get_buffer("running_mean"), norm.get_buffer("running_var")):
            distributed.all_reduce(statistic)
            statistic /= distributed.get_world_size()
