"""Speed of the forward pass of a study's models."""

import json
import time
from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ..compilation import compile_blocks
from ..io import TRANSFORMERS
from ..training.assemble_text import build_family, build_vae
from ..training.families import ClassFamily, Condition, Family
from ..training.prompt_cache import PromptCache
from .config import TEACHER, Study
from .data import word_embeddings
from .measure import best_device

_SPEED_SECONDS = 1.0


def forward_speed(study: Study, transformer: ModelMixin, *, compiled: bool) -> float:
    """Images a second of the forward pass, bfloat16 on a GPU, without anything beside it."""
    device = best_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = transformer.to(device, dtype).eval()
    if compiled:
        torch._dynamo.reset()
        compile_blocks(transformer, dynamic=False)
    batch = study.evaluation.throughput_batch
    family, shape, timestep, condition = _inputs(study, transformer, batch)
    noised = torch.randn(batch, *shape, device=device, dtype=dtype)
    timestep, condition = timestep.to(device), {k: v.to(device) for k, v in condition.items()}
    with torch.no_grad():
        seconds = _seconds_a_call(partial(family, transformer, noised, timestep, condition), device)
    return batch / seconds


def _inputs(
    study: Study, transformer: ModelMixin, batch: int
) -> tuple[Family, tuple[int, int, int], Tensor, Condition]:
    """How the model is called, shape of a latent, timesteps or levels, and a condition."""
    config = transformer.config
    if study.images is None:
        labels = torch.randint(config.num_embeds_ada_norm, (batch,))
        shape = (config.in_channels, config.sample_size, config.sample_size)
        return ClassFamily(config), shape, torch.randint(1000, (batch,)), {"class_labels": labels}
    recipe, encode = study.recipe(TEACHER), word_embeddings(study)
    vae = build_vae(recipe, None)
    _, channels, height, width = PromptCache(study.cache)[0]["mean"].shape
    family = build_family(recipe, transformer, vae)
    return family, (channels, height, width), torch.rand(batch), encode([""] * batch)


def _seconds_a_call(call: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    wait()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < _SPEED_SECONDS:
        call()
        # Else the host runs ahead of the device by more than the time allowed.
        wait()
        calls += 1
    return (time.perf_counter() - started) / calls


def speeds(study: Study, *, compiled: bool) -> dict[str, dict[str, float]]:
    """Forward speed of each run whose model is there; equal architectures are measured once."""
    measured: dict[str, dict[str, float]] = {}
    found = {}
    for run in study.runs:
        last = study.steps(run)[-1]
        file = study.pipeline(run, last) / "transformer" / "config.json"
        if not file.is_file():  # a packed study keeps no more than this of a finished run
            file = study.folder(run) / f"config-{last}.json"
        if not file.is_file():
            continue
        config = json.loads(file.read_text())
        config = {key: value for key, value in config.items() if key != "_name_or_path"}
        key = json.dumps(config, sort_keys=True)
        if key not in measured:
            cls = TRANSFORMERS[config["_class_name"]]
            measured[key] = {
                name: forward_speed(study, cls.from_config(config), compiled=name == "compiled")
                for name in ("eager", *(["compiled"] if compiled else []))
            }
        found[run] = measured[key]
    return found
