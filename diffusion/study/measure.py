"""Quality of a trained model: samples from fixed noise against photographs and its teacher."""

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..evaluation import (
    FeatureSpace,
    Reference,
    analyse_reference,
    compare_images,
    evaluate_images,
    open_feature_space,
)
from ..io import load_pipeline
from ..sampling import balanced_labels, sample_images, sample_prompts
from ..training.images import ImageSource
from .config import TEACHER, Study
from .data import open_source, word_embeddings

_REFERENCE_FILE = "reference.safetensors"
_SAMPLES_FILE = "samples-{step}.safetensors"


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quality(study: Study, run: str, step: int) -> tuple[dict[str, Any], Tensor]:
    """Frechet distance and class accuracy of a run's model at `step`, and pictures of it.

    What learns from the teacher is also compared with it, sample by sample from the same noise. The
    teacher itself is compared with its own samples of the same classes from other noise, to say how
    far unrelated samples are.

    Returns:
        The numbers, and uint8 ``(num_pictures, 3, H, W)``.
    """
    options, device = study.evaluation, best_device()
    source = open_source(study, run)
    space = open_feature_space(options.space, weights=options.weights, device=device)
    labels = balanced_labels(options.num_images, len(source.classes))
    started = time.perf_counter()
    images, parameters = _sample(study, run, step, source)
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
        "parameters": parameters,
        "space": report["description"],
    }
    others = None
    if run == TEACHER:
        _save_whole({"images": images}, _samples_file(study, step))
        others = images.roll(len(source.classes), 0)  # the labels repeat
    elif study.needs(run):
        others = _teacher_samples(study, source)
    if others is not None:
        numbers["teacher"] = compare_images(images, others, space)
    return numbers, images[shown[: options.num_pictures]]


def _sample(study: Study, run: str, step: int, source: ImageSource) -> tuple[Tensor, int]:
    """Samples of a run's model at `step`, balanced over the classes, and its parameters.

    Matrix products are bfloat16 on a GPU; latents and the sampler stay float32.
    """
    options, device = study.evaluation, best_device()
    pipeline = load_pipeline(study.pipeline(run, step).absolute(), dtype=torch.float32)
    pipeline.to(device)
    labels = balanced_labels(options.num_images, len(source.classes))
    settings: dict[str, Any] = {
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "batch_size": options.batch_size,
    }
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        if study.images is None:
            images = sample_images(pipeline, labels, scheduler=options.scheduler, **settings)
        else:
            images = _sample_prompts(study, pipeline, source, labels, settings)
    return images, pipeline.transformer.num_parameters()


def _sample_prompts(
    study: Study,
    pipeline: DiffusionPipeline,
    source: ImageSource,
    labels: list[int],
    settings: dict[str, Any],
) -> Tensor:
    encode = word_embeddings(study)
    empty = {name: value[0] for name, value in encode([""]).items()}
    embeddings = encode([source.classes[label] for label in labels])
    # Schedulers of flows give what they were given: half precision would round every step.
    pipeline.transformer.register_forward_hook(lambda model, inputs, out: (out[0].float(),))
    size = (source.resolution, source.resolution)
    return sample_prompts(pipeline, embeddings, empty, size, **settings)


def _samples_file(study: Study, step: int) -> Path:
    return study.folder(TEACHER) / _SAMPLES_FILE.format(step=step)


def _teacher_samples(study: Study, source: ImageSource) -> Tensor:
    """The teacher's samples; a packed study has left them behind, and they are drawn anew."""
    step = study.steps(TEACHER)[-1]
    file = _samples_file(study, step)
    if file.is_file():
        images = load_file(file)["images"]
        if len(images) == study.evaluation.num_images:
            return images
    images, _ = _sample(study, TEACHER, step, source)
    _save_whole({"images": images}, file)
    return images


def _save_whole(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes beside `file` and renames: other processes may be about to do the same."""
    partial = file.with_suffix(f".{time.monotonic_ns()}")
    save_file(tensors, partial)
    partial.rename(file)


def _reference(file: Path, source: ImageSource, space: FeatureSpace) -> Reference:
    """The real images' features, made by whoever comes first."""
    if file.is_file():
        tensors = load_file(file)
        return Reference(tensors["features"], tensors["accuracy"].item())
    reference = analyse_reference(source, space)
    accuracy = torch.tensor(reference.accuracy, dtype=torch.float64)
    _save_whole({"features": reference.features, "accuracy": accuracy}, file)
    return reference
