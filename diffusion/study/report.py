"""What a study writes: a table as Markdown and CSV, loss curves, pictures side by side."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..evaluation import draw_rows
from ..training.metrics import plot_losses, read_metrics
from .config import TEACHER, Study
from .worker import SPEED_FILE, picture_file, result_file

TABLE_FILES = ("table.md", "table.csv", "loss.png", "samples.png")
# Left out where no row has a value.
_COLUMNS = {
    "run": "",
    "steps": "",
    "Frechet distance": ".2f",
    "class accuracy": ".3f",
    "Frechet to teacher": ".2f",
    "RMS to teacher": ".1f",
    "cosine to teacher": ".4f",
    "loss": ".4f",
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


def _loss(file: Path, name: str, step: int) -> float | None:
    rows = [row for row in read_metrics(file) if name in row and row["step"] <= step]
    last = rows[-max(1, round(_LAST * len(rows))) :]
    return sum(row[name] for row in last) / len(last) if last else None


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
    loss = "loss_noise" if study.images is None else "loss_flow"
    rows = []
    for run, step in _sorted_runs(study):
        numbers = _json(result_file(study, run, step))
        if not numbers:
            continue
        seconds = study.folder(run) / "seconds.json"
        is_last = step == study.steps(run)[-1]
        # What the teacher has of these compares it with itself.
        distance = {} if run == TEACHER else numbers.get("teacher", {})
        cells = {
            "run": study.title(run),
            "steps": step,
            "Frechet distance": numbers["frechet_distance"],
            "class accuracy": numbers["class_accuracy"],
            "Frechet to teacher": distance.get("frechet"),
            "RMS to teacher": distance.get("rms"),
            "cosine to teacher": distance.get("cosine"),
            "loss": _loss(study.folder(run) / "metrics.jsonl", loss, step),
            "images/s eager": speed.get(run, {}).get("eager"),
            "images/s compiled": speed.get(run, {}).get("compiled"),
            "parameters M": numbers["parameters"] / 1e6,
            "training s": json.loads(seconds.read_text())
            if is_last and seconds.is_file()
            else None,
        }
        rows.append(Row(run, study.title(run), step, cells))
    return rows


def _table(rows: list[Row]) -> list[str]:
    def cell(name: str, value: object) -> str:
        return "-" if value is None else format(value, _COLUMNS[name])

    names = [name for name in _COLUMNS if any(row.cells[name] is not None for row in rows)]
    table = [names, ["---"] * len(names)]
    table += [[cell(name, row.cells[name]) for name in names] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in table]


def _notes(study: Study, rows: list[Row]) -> list[str]:
    """What the columns mean, each a paragraph."""
    first = _json(result_file(study, rows[0].run, rows[0].step))
    options = study.evaluation
    sampler = options.scheduler or "the pipeline's sampler"
    guidance = "no guidance"
    if options.guidance_scale > 1:
        guidance = f"classifier-free guidance {options.guidance_scale:g}"
    notes = [
        f"{first['num_images']} samples each from the same noise, {sampler},"
        f" {options.num_inference_steps} steps, {guidance}. Frechet distance: to the"
        f" training images; class accuracy of these {first['real_accuracy']:.3f}."
        f" Features: {first['space']}."
    ]
    compared = _json(result_file(study, TEACHER, study.steps(TEACHER)[-1])).get("teacher")
    if compared is not None:
        notes.append(
            "To teacher: the Frechet distance of the two sets of samples; root of the mean squared"
            " difference of pixels, in levels of 255, and mean cosine of features, of samples from"
            " the same noise. Two samples of the teacher of one class from different noise are"
            f" {compared['rms']:.1f} apart, with cosine {compared['cosine']:.4f}."
        )
    term = "noise" if study.images is None else "flow-matching"
    notes.append(
        f"Loss: the {term} term, mean of the last fifth of the training. Training s: of the whole"
        " run, beside the others."
    )
    if any(row.cells["images/s eager"] is not None for row in rows):
        notes[-1] += f" Images/s: one forward pass, batch {options.throughput_batch}."
    return notes


def _markdown(
    study: Study, rows: list[Row], command: str, failed: dict[str, str], pictures: list[str]
) -> str:
    lines = [f"# {study.heading}", ""] if study.heading else []
    lines += [study.about.strip(), ""] if study.about else []
    lines += _table(rows)
    missing = [
        f"{study.title(run)} at {step}"
        for run, step in _sorted_runs(study)
        if not result_file(study, run, step).is_file()
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for note in _notes(study, rows):
        lines += ["", note]
    lines += ["", f"Seed {study.seed}; {device}, torch {torch.__version__}: `{command}`"]
    for file in pictures:
        lines += ["", f"![{Path(file).stem.replace('_', ' ')}]({file})"]
    lines += ["", f"Not measured yet: {', '.join(missing)}."] if missing else []
    lines += ["", f"Failed: {', '.join(failed)}."] if failed else []
    return "\n".join([*lines, ""])


def write_report(
    study: Study, command: str, failed: dict[str, str], publish: Path | None = None
) -> str:
    """Writes `TABLE_FILES` into the study's folder and gives the Markdown; "" without a result.

    Args:
        study: what was run.
        command: that ran it.
        failed: runs that ended with an error.
        publish: a Markdown file that gets the report too, its pictures beside it as
            ``<stem>_samples.png`` and ``<stem>_loss.png``.
    """
    folder, rows = Path(study.output_dir), rows_of(study)
    if not rows:
        return ""
    table, sheet, curves, samples = (folder / name for name in TABLE_FILES)
    with sheet.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(_COLUMNS))
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
    found = [file for file in (samples, curves) if file.is_file()]
    text = _markdown(study, rows, command, failed, [file.name for file in found])
    table.write_text(text)
    if publish is not None:
        publish.parent.mkdir(parents=True, exist_ok=True)
        copies = [publish.with_name(f"{publish.stem}_{file.name}") for file in found]
        for file, copy in zip(found, copies, strict=True):
            shutil.copy(file, copy)
        names = [copy.name for copy in copies]
        publish.write_text(_markdown(study, rows, command, failed, names))
    return text
