"""`python -m lintra.tools.backbone_study`: attention and norm variants under one recipe.

Every arm is the recipe with other `model.args`; each runs with each seed. The table has the last
accuracy after recalibration, mean and deviation over seeds, and images a second before and after
folding. A finished run is not repeated.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import timm
import torch

from lintra.vision import fold_norms
from lintra.vision.training.config import Recipe, parse_recipe
from lintra.vision.training.loop import BackboneTrainer
from lintra.vision.training.records import read_metrics
from lintra.vision.training.throughput import images_per_second

ARMS = {
    "softmax, LayerNorm": {"attn": "softmax", "norm": "ln"},
    "softmax, PRepBN": {"attn": "softmax", "norm": "prepbn"},
    "InLine, LayerNorm": {"attn": "inline", "norm": "ln"},
    "InLine, PRepBN": {"attn": "inline", "norm": "prepbn"},
    "SLA, LayerNorm": {"attn": "sla", "norm": "ln"},
    "SLA, PRepBN (SLAB)": {"attn": "sla", "norm": "prepbn"},
}
DEFAULT_ARMS = [
    "softmax, LayerNorm",
    "InLine, LayerNorm",
    "SLA, LayerNorm",
    "SLA, PRepBN (SLAB)",
]
COLUMNS = ("arm", "top-1 %", "per seed", "parameters M", "images/s", "folded images/s")


class Stopped(Exception):
    """A signal ended a run; the same command goes on from its checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}; the same command goes on from there")
        self.signum = signum


def _arm_recipe(recipe: Recipe, arm: str, seed: int) -> Recipe:
    folder = Path(recipe.output_dir) / f"{'-'.join(ARMS[arm].values())}-seed{seed}"
    model = replace(recipe.model, args={**recipe.model.args, **ARMS[arm]})
    checkpoint = replace(recipe.checkpoint, resume="latest")
    return replace(recipe, output_dir=str(folder), model=model, seed=seed, checkpoint=checkpoint)


def _last_accuracy(folder: Path) -> float:
    keys = ("accuracy_recalibrated", "accuracy_ema", "accuracy")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if any(k in row for k in keys)]
    return next(rows[-1][key] for key in keys if key in rows[-1])


def run_arm(
    recipe: Recipe, arm: str, seeds: Sequence[int], batch_size: int, seconds: float
) -> list[str]:
    """Trains one arm with every seed and returns its row of the table."""
    accuracies = []
    for seed in seeds:
        run = _arm_recipe(recipe, arm, seed)
        folder = Path(run.output_dir)
        if not (folder / "last").is_dir():
            result = BackboneTrainer(run).run()
            if result.signum is not None:
                raise Stopped(result.signum)
        accuracies.append(_last_accuracy(folder))
        print(f"{arm}, seed {seed}: {accuracies[-1]:.2f} %", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(f"local-dir:{folder / 'last'}", pretrained=True).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    sizes = getattr(model, "img_size", None) or model.patch_embed.img_size
    dtype = torch.bfloat16 if device == "cuda" else None
    speeds = [
        images_per_second(network, (3, *sizes), batch_size=batch_size, dtype=dtype, seconds=seconds)
        for network in (model, fold_norms(model))
    ]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return [
        arm,
        f"{statistics.mean(accuracies):.2f} +- {deviation:.2f}",
        ", ".join(f"{accuracy:.2f}" for accuracy in accuracies),
        f"{parameters / 1e6:.2f}",
        *(f"{speed:.0f}" for speed in speeds),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lintra.tools.backbone_study",
        description=__doc__.partition("\n")[0],
        epilog="Further words are overrides of the recipe, e.g. --training.epochs 30.",
    )
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=DEFAULT_ARMS, choices=list(ARMS))
    parser.add_argument("--table", help="file for the table, beside printing it")
    parser.add_argument("--throughput-batch", type=int, default=256)
    parser.add_argument("--throughput-seconds", type=float, default=2.0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for a wrong recipe, 128 + signal if stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    options, overrides = _parser().parse_known_args(words)
    recipe = parse_recipe(["--config", options.config, *overrides], "backbone_study", "")
    rows = []
    try:
        for arm in options.arms:
            rows.append(
                run_arm(
                    recipe, arm, options.seeds, options.throughput_batch, options.throughput_seconds
                )
            )
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    command = f"python -m lintra.tools.backbone_study {shlex.join(words)}"
    text = "\n".join([*lines, "", f"{device}, torch {torch.__version__}: `{command}`", ""])
    print(text)
    if options.table:
        Path(options.table).parent.mkdir(parents=True, exist_ok=True)
        Path(options.table).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
