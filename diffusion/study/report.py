"""What a study writes: a table as Markdown and CSV, loss curves, pictures side by side."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..evaluation import draw_rows
from ..training.metrics import plot_losses, read_metrics
from .config import TEACHER, Study
from .worker import SPEED_FILE, picture_file, result_file

TABLE_FILES = ("table.md", "table.csv", "loss.png", "samples.png")
_COLUMNS = {
    "run": "",
    "steps": "",
    "Frechet distance": ".2f",
    "class accuracy": ".3f",
    "noise loss": ".4f",
    "images/s eager": ".0f",
    "images/s compiled": ".0f",
    "parameters M": ".2f",
    "training s": ".0f",
}
# The last share of a run's logged losses that its table shows the mean of.
_LAST = 0.2


@dataclass(frozen=True)
class Row:
    """One run at one step."""

    run: str
    title: str
    step: int
    cells: dict[str, object]


def _json(file: Path) -> dict:
    return json.loads(file.read_text()) if file.is_file() else {}


def _noise_loss(file: Path, step: int) -> float | None:
    rows = [row for row in read_metrics(file) if "loss_noise" in row and row["step"] <= step]
    last = rows[-max(1, round(_LAST * len(rows))) :]
    return sum(row["loss_noise"] for row in last) / len(last) if last else None


def _sorted_runs(study: Study) -> list[tuple[str, int]]:
    """Runs and steps, the shorter lengths of all arms before the longer ones."""
    longest = max(len(study.steps(run)) for run in study.runs)
    pairs = [(TEACHER, study.steps(TEACHER)[0])]
    for index in range(longest):
        for arm in study.arms:
            if index < len(steps := study.steps(arm)):
                pairs.append((arm, steps[index]))
    return pairs


def rows_of(study: Study) -> list[Row]:
    """A row for every measured run and step."""
    speed = _json(Path(study.output_dir) / SPEED_FILE)
    rows = []
    for run, step in _sorted_runs(study):
        numbers = _json(result_file(study, run, step))
        if not numbers:
            continue
        seconds = study.folder(run) / "seconds.json"
        is_last = step == study.steps(run)[-1]
        cells = {
            "run": study.title(run),
            "steps": step,
            "Frechet distance": numbers["frechet_distance"],
            "class accuracy": numbers["class_accuracy"],
            "noise loss": _noise_loss(study.folder(run) / "metrics.jsonl", step),
            "images/s eager": speed.get(run, {}).get("eager"),
            "images/s compiled": speed.get(run, {}).get("compiled"),
            "parameters M": numbers["parameters"] / 1e6,
            "training s": json.loads(seconds.read_text())
            if is_last and seconds.is_file()
            else None,
        }
        rows.append(Row(run, study.title(run), step, cells))
    return rows


def _markdown(study: Study, rows: list[Row], command: str, failed: dict[str, str]) -> str:
    def cell(name: str, value: object) -> str:
        return "-" if value is None else format(value, _COLUMNS[name])

    table = [list(_COLUMNS), ["---"] * len(_COLUMNS)]
    table += [[cell(name, value) for name, value in row.cells.items()] for row in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    missing = [
        f"{study.title(run)} at {step}"
        for run, step in _sorted_runs(study)
        if not result_file(study, run, step).is_file()
    ]
    measured = _json(result_file(study, rows[0].run, rows[0].step))
    options = study.evaluation
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines += [
        "",
        f"{measured['num_images']} samples each from the same noise, {options.scheduler},"
        f" {options.num_inference_steps} steps, no guidance; class accuracy of the real images"
        f" {measured['real_accuracy']:.3f}. Features: {measured['space']}.",
        "",
        "Noise loss: mean of the last fifth of the training losses. Images/s: one forward pass,"
        f" batch {options.throughput_batch}. Training s: of the whole run, beside the others.",
        "",
        f"Seed {study.seed}; {device}, torch {torch.__version__}: `{command}`",
    ]
    lines += ["", f"Not measured yet: {', '.join(missing)}."] if missing else []
    lines += ["", f"Failed: {', '.join(failed)}."] if failed else []
    return "\n".join([*lines, ""])


def write_report(study: Study, command: str, failed: dict[str, str]) -> str:
    """Writes `TABLE_FILES` into the study's folder and gives the Markdown; "" without a result."""
    folder, rows = Path(study.output_dir), rows_of(study)
    if not rows:
        return ""
    text = _markdown(study, rows, command, failed)
    table, sheet, curves, samples = (folder / name for name in TABLE_FILES)
    table.write_text(text)
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(_COLUMNS))
        writer.writeheader()
        writer.writerows(row.cells for row in rows)
    logs = {study.title(run): study.folder(run) / "metrics.jsonl" for run in study.runs}
    plot_losses({title: file for title, file in logs.items() if file.is_file()}, curves)
    pictures = {
        f"{row.title}, {row.step} steps": torch.load(
            picture_file(study, row.run, row.step), weights_only=True
        )
        for row in rows
        if row.step == study.steps(row.run)[-1]
    }
    if pictures:
        draw_rows(pictures, samples)
    return text
