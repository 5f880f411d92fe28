"""Checkpoints of a run: written whole or not at all, pruned, found and restored."""

import json
import logging
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LRScheduler

from ..io import load_transformer, replace_folder
from .config import CheckpointConfig
from .trainable import TRAINED_FILE, load_trained, save_trained, trains_all

logger = logging.getLogger(__name__)

_PREFIX = "checkpoint-"
_STATE_FILE = "run.json"
# What `reduce_to_weights` leaves of a checkpoint.
_WEIGHTS_ONLY = "weights_only"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    found = [
        path
        for path in output_dir.glob(f"{_PREFIX}*")
        if path.is_dir() and path.name.removeprefix(_PREFIX).isdigit()
    ]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """Optimiser steps at which a checkpoint folder was written, by its name."""
    return int(folder.name.removeprefix(_PREFIX))


def resolve_checkpoint(choice: str | None, output_dir: Path) -> Path | None:
    """The folder to resume from: `choice` itself, the newest for `latest`, None to start anew.

    Raises:
        ValueError: the folder does not exist or holds no finished checkpoint.
    """
    if choice is None:
        return None
    if choice == "latest":
        checkpoints = list_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    folder = Path(choice)
    if not (folder / _STATE_FILE).is_file():
        raise ValueError(
            f"`checkpoint.resume_from_checkpoint` must be a checkpoint folder, got {choice!r}"
        )
    return folder


@torch.no_grad()
def reduce_to_weights(checkpoint: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes to `folder` a checkpoint of averaged weights alone, an eighth of the bytes in bf16.

    A run that resumes from it goes on at the same step from the averaged weights, with new moments
    of the optimiser: not exact, but small enough to carry to another machine.

    Args:
        checkpoint: the whole one, not sharded.
        folder: written to.
        dtype: of the weights.
    """
    model = load_transformer(checkpoint)
    for file in checkpoint.glob("custom_checkpoint_*.pkl"):
        averages = torch.load(file, map_location="cpu", weights_only=True).get("shadow_params", [])
        for parameter, average in zip(model.parameters(), averages, strict=False):
            parameter.copy_(average)
    model.to(dtype).save_pretrained(folder / "transformer")
    state = json.loads((checkpoint / _STATE_FILE).read_text())
    (folder / _STATE_FILE).write_text(json.dumps(state | {_WEIGHTS_ONLY: True}))


class CheckpointKeeper:
    """Saves and restores everything that `accelerator` holds.

    The transformer lies in `transformer/`, as `save_pretrained` writes it, so that a checkpoint
    opens like any model. Where most of it is frozen, what learns lies in one flat file instead,
    which for CLEAR is laid out as its official weights are. Under FSDP and DeepSpeed the sharded
    state is accelerate's own, written by all processes; call `save` and `load` on every process.

    Args:
        accelerator: with model, optimiser and other state prepared or registered.
        output_dir: folder of the run.
        config: number of checkpoints to keep.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, config: CheckpointConfig):
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.config = config
        accelerator.register_save_state_pre_hook(self._write_models)
        accelerator.register_load_state_pre_hook(self._read_models)

    def _write_models(self, models: list, weights: list, folder: str) -> None:
        for index in reversed(range(len(weights))):
            if self.accelerator.is_main_process:
                model: ModelMixin = self.accelerator.unwrap_model(models[index])
                if trains_all(model):
                    model.save_pretrained(Path(folder) / "transformer", state_dict=weights[index])
                else:
                    save_trained(model, weights[index], Path(folder))
            weights.pop(index)  # accelerate would write what is left a second time

    def _read_models(self, models: list, name: str) -> None:
        folder = Path(name)
        if (folder / TRAINED_FILE).is_file():
            while models:
                load_trained(self.accelerator.unwrap_model(models.pop()), folder / TRAINED_FILE)
            return
        if not (folder / "transformer").is_dir():
            return  # sharded state: accelerate reads it
        while models:
            model: ModelMixin = self.accelerator.unwrap_model(models.pop())
            saved = type(model).from_pretrained(folder / "transformer")
            model.load_state_dict(saved.state_dict())

    def _load_weights(self, folder: Path, step: int) -> None:
        models = list(self.accelerator._models)
        self._read_models(models, str(folder))
        model = self.accelerator.unwrap_model(self.accelerator._models[0])
        for held in self.accelerator._custom_objects:
            if isinstance(held, EMAModel):
                held.shadow_params = [p.detach().clone() for p in model.parameters()]
                held.optimization_step = step
            elif isinstance(held, LRScheduler):
                for _ in range(step - held.last_epoch):
                    held.step()

    def save(self, step: int) -> Path:
        """Writes `checkpoint-{step}` and removes the oldest beyond the limit."""
        folder = self.output_dir / f"{_PREFIX}{step}"
        partial = folder.with_name(f"{folder.name}.partial")
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # DeepSpeed would write the frozen parameters, too, of which nothing changes.
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        arguments = {"exclude_frozen_parameters": True} if is_deepspeed else {}
        self.accelerator.save_state(str(partial), **arguments)
        self.accelerator.wait_for_everyone()
        if main:
            state = {"step": step, "num_processes": self.accelerator.num_processes}
            (partial / _STATE_FILE).write_text(json.dumps(state))
            replace_folder(partial, folder)
            limit = self.config.checkpoints_total_limit
            for old in list_checkpoints(self.output_dir)[: -limit if limit else 0]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return folder

    def load(self, folder: Path) -> int:
        """Restores a checkpoint and returns its step.

        Raises:
            ValueError: a file of the checkpoint is missing or damaged.
        """
        try:
            state = json.loads((folder / _STATE_FILE).read_text())
            step = state["step"]
            if state.get(_WEIGHTS_ONLY):
                self._load_weights(folder, step)
            else:
                is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
                arguments = {"load_module_strict": False} if is_deepspeed else {}
                self.accelerator.load_state(str(folder), **arguments)
            for held in self.accelerator._custom_objects:
                if isinstance(held, EMAModel):
                    held.to(self.accelerator.device)  # accelerate reads them to the CPU
        except Exception as error:  # safetensors, zip, pickle and json each have their own
            raise ValueError(
                f"`checkpoint.resume_from_checkpoint` must be a whole checkpoint, but {folder}"
                f" cannot be read: {error}"
            ) from error
        logger.info("resumed from %s", folder)
        return step
