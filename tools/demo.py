"""`lintra demo`: a teacher, a distilled LiT and two controls on handwritten digits, and a table."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lintra.diffusion.evaluation import draw_rows, evaluate_images, open_feature_space
from lintra.diffusion.io import load_pipeline
from lintra.diffusion.losses import LOSS_TERMS
from lintra.diffusion.sampling import balanced_labels, sample_images
from lintra.diffusion.training.config import Recipe, parse_recipe
from lintra.diffusion.training.images import open_images
from lintra.diffusion.training.loop import RECIPE_FILE
from lintra.diffusion.training.metrics import plot_losses

from .distill import run_recipe

_COLUMNS = ("model", "steps", "class accuracy", "Frechet distance", "seconds per image")
_SHORT = {"steps": 4, "images": 20}


def _variants(recipe: Recipe, folder: Path) -> dict[str, Recipe]:
    """The distilled student and its controls: same recipe, steps and seed, one thing changed."""
    own_terms = {k: v for k, v in recipe.loss.items() if not LOSS_TERMS[k].needs_teacher}
    scratch = replace(recipe.model, inherit="none")
    return {
        "LiT distilled": replace(recipe, output_dir=str(folder / "distilled")),
        "LiT inherited": replace(recipe, output_dir=str(folder / "inherited"), loss=own_terms),
        "LiT from scratch": replace(
            recipe, output_dir=str(folder / "scratch"), model=scratch, loss=own_terms
        ),
    }


def _shorten(recipe: Recipe) -> Recipe:
    return replace(
        recipe,
        training=replace(recipe.training, max_train_steps=_SHORT["steps"], train_batch_size=8),
        validation=replace(recipe.validation, num_validation_images=4, num_inference_steps=2),
    )


def _train(recipe: Recipe, *, reuse: bool = False) -> None:
    """Runs a recipe unless its pipeline is there already from the very same recipe."""
    record = Path(recipe.output_dir) / "pipeline" / RECIPE_FILE
    if reuse and record.is_file() and json.loads(record.read_text()) == asdict(recipe):
        print(f"{recipe.output_dir}: taken from an earlier run")
        return
    code, _ = run_recipe(recipe)
    if code:
        sys.exit(code)


def _measure(recipe: Recipe, num_images: int) -> tuple[dict[str, float], Tensor]:
    """Table row and images of a trained recipe; all models start from the same noise."""
    pipeline = load_pipeline(Path(recipe.output_dir) / "pipeline")
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    data = recipe.data
    source = open_images(
        data.source, path=data.path, resolution=data.resolution, channels=data.channels
    )
    labels = balanced_labels(num_images, len(source.classes))
    started = time.perf_counter()
    images = sample_images(
        pipeline,
        labels,
        num_inference_steps=recipe.validation.num_inference_steps,
        guidance_scale=recipe.validation.guidance_scale,
        seed=1_000_000,
        batch_size=200,
    )
    seconds = time.perf_counter() - started
    report = evaluate_images(images, labels, source, open_feature_space("digits"))
    row = {
        "steps": recipe.training.max_train_steps,
        "class accuracy": round(report["class_accuracy"], 4),
        "Frechet distance": round(report["frechet_distance"], 3),
        "seconds per image": round(seconds / num_images, 4),
    }
    return row, images[: len(source.classes)]


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    lines += [f"| {title} | {' | '.join(map(str, row.values()))} |" for title, row in rows.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit code is that of the first run that fails, else 0."""
    parser = ArgumentParser(prog="lintra demo", description=__doc__)
    parser.add_argument(
        "--teacher_config", type=str, default="configs/quickstart_digits_teacher.yaml"
    )
    parser.add_argument("--config", type=str, default="configs/quickstart_digits.yaml")
    parser.add_argument("--output_dir", type=str, default="runs/demo")
    parser.add_argument("--num_images", type=int, default=1000, help="samples a model is judged by")
    parser.add_argument("--short", action="store_true", help="a few steps: does it run?")
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    folder = Path(options.output_dir) / ("short" if options.short else "")
    shorten = _shorten if options.short else lambda recipe: recipe
    num_images = _SHORT["images"] if options.short else options.num_images

    teacher_dir = f"--output_dir={folder / 'teacher'}"
    words = [f"--config={options.teacher_config}", teacher_dir]
    recipes = {"DiT teacher": shorten(parse_recipe(words, "lintra demo", ""))}
    _train(recipes["DiT teacher"], reuse=True)
    words = [f"--config={options.config}"]
    words += [f"--model.pretrained_teacher_model={folder / 'teacher' / 'pipeline'}"]
    recipes |= _variants(shorten(parse_recipe(words, "lintra demo", "")), folder)
    for title, recipe in recipes.items():
        if title != "DiT teacher":
            _train(recipe)
    measured = {title: _measure(recipe, num_images) for title, recipe in recipes.items()}

    table = format_table({title: row for title, (row, _) in measured.items()})
    (folder / "table.md").write_text(table + "\n")
    draw_rows({title: images for title, (_, images) in measured.items()}, folder / "samples.png")
    logs = {title: Path(recipe.output_dir) / "metrics.jsonl" for title, recipe in recipes.items()}
    plot_losses(logs, folder / "loss.png")
    print(f"\n{table}\n\n{open_feature_space('digits').description}\nresults: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
