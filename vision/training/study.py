"""Attention and norm variants under one recipe: every arm with every seed, and their table.

An arm is the recipe with other `model.args`. A finished run is not repeated, so a study that was
cut short goes on where it was.
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import nn

from ..fold import fold_norms
from .config import Recipe
from .data import image_size
from .loop import BackboneTrainer, TrainingDiverged, create_backbone
from .records import StopRequest, read_metrics
from .throughput import images_per_second

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
    "InLine, PRepBN",
    "SLA, LayerNorm",
    "SLA, PRepBN (SLAB)",
]
# Of a model whose speed is measured without weights: the head is too small to matter.
_UNTRAINED_CLASSES = 10
COLUMNS = ("arm", "top-1 %", "per seed", "parameters M", "images/s", "folded images/s")


class Stopped(Exception):
    """A signal ended a run; the same command goes on from its checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}; the same command goes on from there")
        self.signum = signum


def arm_recipe(recipe: Recipe, arm: str, seed: int) -> Recipe:
    """The recipe of one run of a study, in a folder of its own below the recipe's."""
    folder = Path(recipe.output_dir) / f"{'-'.join(ARMS[arm].values())}-seed{seed}"
    model = replace(recipe.model, args={**recipe.model.args, **ARMS[arm]})
    checkpoint = replace(recipe.checkpoint, resume="latest")
    return replace(recipe, output_dir=str(folder), model=model, seed=seed, checkpoint=checkpoint)


def _last_accuracy(folder: Path) -> float:
    keys = ("accuracy_recalibrated", "accuracy_ema", "accuracy")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if any(k in row for k in keys)]
    return next(rows[-1][key] for key in keys if key in rows[-1])


def _train(run: Recipe) -> int:
    """One run; 0, or 128 + signal if one stopped it."""
    try:
        result = BackboneTrainer(run).run()
    except TrainingDiverged as error:
        (Path(run.output_dir) / "diverged").write_text(str(error))
        return 0
    return 0 if result.signum is None else 128 + result.signum


def _exit_with_train(run: Recipe, threads: int) -> None:
    torch.set_num_threads(threads)
    sys.exit(_train(run))


def train_all(runs: Sequence[Recipe], jobs: int = 1) -> None:
    """Trains every run that is not finished.

    Args:
        runs: of one study.
        jobs: so many at once, each in a process of its own; 1 trains them here.

    Raises:
        Stopped: a signal; every run that was going on has left a checkpoint.
        RuntimeError: a process failed; its traceback is on stderr, the other runs end first.
    """
    waiting = [run for run in runs if not _finished(run)]
    if jobs > 1:
        _train_in_processes(waiting, jobs)
        return
    for run in waiting:
        code = _train(run)
        print(f"{run.output_dir}: {_outcome(run)}", flush=True)
        if code:
            raise Stopped(code - 128)


def _train_in_processes(waiting: list[Recipe], jobs: int) -> None:
    active: list[tuple[Recipe, multiprocessing.process.BaseProcess]] = []
    context = multiprocessing.get_context("spawn")
    failed: list[str] = []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with StopRequest() as stop:
        while active or (waiting and not stop.signum and not failed):
            while waiting and len(active) < jobs and not stop.signum and not failed:
                run = waiting.pop(0)
                process = context.Process(target=_exit_with_train, args=(run, threads))
                process.start()
                active.append((run, process))
            time.sleep(0.05)
            for pair in list(active):
                run, running = pair
                if running.exitcode is None:
                    if stop.signum:
                        running.terminate()
                    continue
                active.remove(pair)
                print(f"{run.output_dir}: {_outcome(run)}", flush=True)
                if running.exitcode and not stop.signum:
                    failed.append(run.output_dir)
    if stop.signum:
        raise Stopped(stop.signum)
    if failed:
        raise RuntimeError(f"failed, see above: {', '.join(failed)}")


def _finished(run: Recipe) -> bool:
    return any((Path(run.output_dir) / name).exists() for name in ("last", "diverged"))


def _outcome(run: Recipe) -> str:
    folder = Path(run.output_dir)
    if (folder / "diverged").exists():
        return f"diverged ({(folder / 'diverged').read_text()})"
    return f"{_last_accuracy(folder):.2f} %" if (folder / "last").is_dir() else "not finished"


def _speeds(model: nn.Module, batch_size: int, seconds: float, device: str) -> list[str]:
    """Images a second before and after folding, which is done in place."""
    sizes, dtype = image_size(model), torch.bfloat16 if device == "cuda" else None
    found = []
    for prepare in (lambda network: network, fold_norms):
        network = prepare(model)
        found.append(
            images_per_second(
                network, (3, *sizes), batch_size=batch_size, dtype=dtype, seconds=seconds
            )
        )
    return [f"{speed:.0f}" for speed in found]


def _row(
    arm: str, runs: Sequence[Recipe], batch_size: int, seconds: float, device: str
) -> list[str]:
    """One arm's row of the table; its speed is that of its first run with weights, or of none."""
    ended = [Path(run.output_dir) for run in runs if (Path(run.output_dir) / "last").is_dir()]
    each = ", ".join(_outcome(run).removesuffix(" %") for run in runs)
    if not ended:
        model = create_backbone(runs[0], _UNTRAINED_CLASSES).to(device)
        has_diverged = any((Path(run.output_dir) / "diverged").exists() for run in runs)
        outcome = "diverged" if has_diverged else "not trained"
        return [arm, outcome, each, "-", *_speeds(model, batch_size, seconds, device)]
    model = timm.create_model(f"local-dir:{ended[0] / 'last'}", pretrained=True).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    accuracies = [_last_accuracy(folder) for folder in ended]
    deviation = f" +- {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    share = f" ({len(ended)} of {len(runs)} runs)" if len(ended) < len(runs) else ""
    return [
        arm,
        f"{statistics.mean(accuracies):.2f}{deviation}{share}",
        each,
        f"{parameters / 1e6:.2f}",
        *_speeds(model, batch_size, seconds, device),
    ]


def table(
    runs: Mapping[str, Sequence[Recipe]], command: str, *, batch_size: int, seconds: float
) -> str:
    """Markdown: accuracy after recalibration, and images a second before and after folding.

    Args:
        runs: arm -> its runs, finished, diverged or not begun: speed needs no training.
        command: that made them, for the last line.
        batch_size: images at a time, for the speed.
        seconds: that each speed is measured.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [_row(arm, each, batch_size, seconds, device) for arm, each in runs.items()]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    return "\n".join([*lines, "", f"{name}, {versions}: `{command}`", ""])
