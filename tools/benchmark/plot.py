"""The picture of a run: bars of milliseconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .case import FLOOR_FACTOR, OURS
from .report import Environment, Line, lines_of
from .runner import Row

_BARS = 0.8  # of the space of a shape


def write_plot(path: Path, rows: Sequence[Row], environment: Environment) -> None:
    """A panel for each direction, a group of bars for each shape, a tick at the floor."""
    # Without pyplot no display is asked for.
    from matplotlib.figure import Figure

    lines = lines_of(rows)
    panels = {
        direction: [line for line in lines if line.ours.direction == direction]
        for direction in FLOOR_FACTOR
    }
    panels = {direction: shown for direction, shown in panels.items() if shown}
    impls = [OURS, *dict.fromkeys(name for line in lines for name in line.peers)]
    height = 1.5 + 0.16 * len(impls) * max(map(len, panels.values()))
    figure = Figure(figsize=(6 * len(panels), height), layout="constrained")
    figure.suptitle(f"{environment.gpu}, {environment.dtype}, {environment.date}", fontsize=9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (direction, shown) in zip(axes, panels.items(), strict=True):
        _draw(panel, shown, impls)
        panel.set_xlabel(f"{direction}, ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, lines: Sequence[Line], impls: Sequence[str]) -> None:
    for place, impl in enumerate(impls):
        heights, values = [], []
        for index, line in enumerate(lines):
            row = line.ours if impl == OURS else line.peers.get(impl)
            if row is not None and row.times is not None:
                heights.append(index + ((place + 0.5) / len(impls) - 0.5) * _BARS)
                values.append(row.times.p50)
        if values:
            axes.barh(heights, values, height=_BARS / len(impls), label=impl)
    floors = [(line.ours.floor_ms, index) for index, line in enumerate(lines) if line.ours.floor_ms]
    if floors:
        x, y = zip(*floors, strict=True)
        axes.scatter(x, y, marker="|", s=120, color="black", label="floor")
    axes.set_yticks(range(len(lines)), [f"{x.case.group} {x.case.shape}" for x in lines])
    axes.tick_params(labelsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
