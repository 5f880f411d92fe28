"""Metrics of a run: one JSON object a line, and a plot of the losses."""

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor


class Window:
    """Means of the losses since it was made; values stay on the device until `means`."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.micro_steps = 0
        self.gradient_norm: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        self.micro_steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self) -> dict[str, Tensor]:
        return {name: value / self.micro_steps for name, value in self._sums.items()}

    def seconds(self) -> float:
        return time.perf_counter() - self.started


class MetricsFile:
    """`metrics.jsonl`. Opening it for a resumed run drops what lies after the resumed step."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= first_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, none if there is no file.

    A last line without its end is one that is being written, or was when its process was killed.
    """
    if not path.is_file():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def plot_losses(runs: dict[str, Path], file: Path) -> None:
    """Draws every loss term of every run over the steps into one PNG, a panel a term.

    Args:
        runs: title -> metrics.jsonl.
        file: the picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {title: read_metrics(path) for title, path in runs.items()}
    names = sorted({key for run in rows.values() for row in run for key in row if "loss" in key})
    if not names:
        return
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 3.5), squeeze=False, layout="constrained"
    )
    for name, axis in zip(names, axes[0], strict=True):
        for title, run in rows.items():
            points = [(row["step"], row[name]) for row in run if name in row]
            if points:
                color = f"C{list(rows).index(title)}"
                axis.plot(*zip(*points, strict=True), label=title, color=color, linewidth=1)
        axis.set(title=name, xlabel="step", yscale="log")
    if len(runs) > 1:
        handles = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
        figure.legend(
            handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=5
        )
    figure.savefig(file, dpi=110)
    plt.close(figure)
