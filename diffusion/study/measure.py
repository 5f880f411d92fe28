"""Measures of a trained model: quality from fixed noise, and the speed of its forward pass."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..compilation import compile_blocks
from ..evaluation import Reference, analyse_reference, evaluate_images, open_feature_space
from ..io import TRANSFORMERS, load_pipeline
from ..sampling import balanced_labels, sample_images
from ..training.images import ImageSource, open_images
from .config import Study

_REFERENCE_FILE = "reference.safetensors"
_SPEED_SECONDS = 1.0


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_source(study: Study, run: str) -> ImageSource:
    """The images that a run is trained on and measured against."""
    data = study.recipe(run).data
    return open_images(
        data.source,
        path=data.path,
        resolution=data.resolution,
        channels=data.channels,
        center_crop=data.center_crop,
        interpolation=data.image_interpolation_mode,
        split=data.split,
    )


def quality(study: Study, run: str, step: int) -> tuple[dict[str, Any], Tensor]:
    """Frechet distance and class accuracy of a run's model at `step`, and pictures of it.

    Matrix products are bfloat16 on a GPU; latents and the sampler stay float32.

    Returns:
        The numbers, and uint8 ``(num_pictures, 3, H, W)``.
    """
    options, device = study.evaluation, best_device()
    source = open_source(study, run)
    space = open_feature_space(options.space, weights=options.weights, device=device)
    pipeline = load_pipeline(study.pipeline(run, step).absolute(), dtype=torch.float32)
    pipeline.to(device)
    labels = balanced_labels(options.num_images, len(source.classes))
    started = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        images = sample_images(
            pipeline,
            labels,
            num_inference_steps=options.num_inference_steps,
            seed=options.seed,
            batch_size=options.batch_size,
            scheduler=options.scheduler,
        )
    seconds = time.perf_counter() - started
    reference = _reference(Path(study.output_dir) / _REFERENCE_FILE, source, space)
    report = evaluate_images(images, labels, source, space, reference=reference)
    shown = [index for index, label in enumerate(labels) if label in options.picture_labels]
    numbers = {
        "frechet_distance": report["frechet_distance"],
        "class_accuracy": report["class_accuracy"],
        "real_accuracy": report["source_accuracy"],
        "num_images": len(images),
        "sampling_seconds": seconds,
        "parameters": pipeline.transformer.num_parameters(),
        "space": report["description"],
    }
    return numbers, images[shown[: options.num_pictures]]


def _reference(file: Path, source: ImageSource, space: Any) -> Reference:
    """The real images' features, made by whoever comes first."""
    if file.is_file():
        tensors = load_file(file)
        return Reference(tensors["features"], tensors["accuracy"].item())
    reference = analyse_reference(source, space)
    accuracy = torch.tensor(reference.accuracy, dtype=torch.float64)
    partial = file.with_suffix(f".{time.monotonic_ns()}")
    save_file({"features": reference.features, "accuracy": accuracy}, partial)
    partial.rename(file)
    return reference


def forward_speed(transformer: DiTTransformer2DModel, batch: int, *, compiled: bool) -> float:
    """Images a second of the forward pass, bfloat16 on a GPU, without anything beside it."""
    device = best_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = transformer.to(device, dtype).eval()
    if compiled:
        torch._dynamo.reset()
        compile_blocks(transformer, dynamic=False)
    config = transformer.config
    side = config.sample_size
    latents = torch.randn(batch, config.in_channels, side, side, device=device, dtype=dtype)
    timestep = torch.randint(1000, (batch,), device=device)
    labels = torch.randint(config.num_embeds_ada_norm, (batch,), device=device)
    with torch.no_grad():
        return batch / _seconds_a_call(lambda: transformer(latents, timestep, labels), device)


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
            batch = study.evaluation.throughput_batch
            measured[key] = {
                name: forward_speed(cls.from_config(config), batch, compiled=name == "compiled")
                for name in ("eager", *(["compiled"] if compiled else []))
            }
        found[run] = measured[key]
    return found
