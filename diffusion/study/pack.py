"""A study in few bytes, to go on with on another machine: results whole, weights in bfloat16."""

import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from ..io import load_pipeline, save_pipeline
from ..training.checkpoint import list_checkpoints, reduce_to_weights
from ..training.loop import RECIPE_FILE
from .config import TEACHER, Study
from .report import TABLE_FILES
from .worker import is_finished, is_trained, result_file

PART_BYTES = 15 * 2**20
_PART = "state.tar.{index:02d}"
# Weights of finished arms go along where they are as small as this.
_SMALL_BYTES = 2_000_000
_RESULTS = ("measured-*.json", "pictures-*", "metrics.jsonl", "seconds.json", "log.txt")


def _copy_results(study: Study, target: Path) -> None:
    source = Path(study.output_dir)
    for file in [source / name for name in (*TABLE_FILES, "speed.json")]:
        if file.is_file():
            shutil.copy(file, target / file.name)
    for run in study.runs:
        (target / run).mkdir()
        for pattern in _RESULTS:
            for file in study.folder(run).glob(pattern):
                shutil.copy(file, target / run / file.name)
        for step in study.steps(run):
            config = study.pipeline(run, step) / "transformer" / "config.json"
            if config.is_file():
                shutil.copy(config, target / run / f"config-{step}.json")


def _weights(study: Study) -> Iterator[tuple[str, Path, Callable[[Path], None]]]:
    """What else is needed to go on, the most needed first: title, folder, how to write it."""
    waiting = [arm for arm in study.arms if not is_finished(study, arm)]
    donors = [study.donor_step(arm) for arm in waiting]
    for step in dict.fromkeys([*study.steps(TEACHER), *donors]):
        if (folder := study.pipeline(TEACHER, step)).is_dir():
            yield f"{TEACHER} at {step}", folder, partial(_save_half, folder)
    for run in study.runs:
        for step in study.steps(run) if run != TEACHER else []:
            folder = study.pipeline(run, step)
            is_model = is_trained(study, run) if step == study.steps(run)[-1] else folder.is_dir()
            is_measured = result_file(study, run, step).is_file()
            if is_model and (not is_measured or _size(folder) / 2 < _SMALL_BYTES):
                yield f"{run} at {step}", folder, partial(_save_half, folder)
        found = [] if is_trained(study, run) else list_checkpoints(study.folder(run))
        if found and (found[-1] / "transformer").is_dir():
            yield f"{run}, stopped", found[-1], partial(reduce_to_weights, found[-1])


def _save_half(pipeline: Path, target: Path) -> None:
    record = pipeline / RECIPE_FILE
    texts = {RECIPE_FILE: record.read_text()} if record.is_file() else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_pipeline(load_pipeline(pipeline.absolute(), dtype=torch.bfloat16), target, texts)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def pack_study(
    study: Study, folder: Path, *, limit: int, say: Callable[[str], None] = print
) -> list[Path]:
    """Writes the results, and as many weights as `limit` bytes allow, as parts of one archive.

    The teacher comes first, then the donors that unfinished arms need, then arms that are trained
    but not measured or were stopped. Finished arms keep their numbers and pictures, and their
    weights only where they are under 2 MB. What is left out is said, and is trained again; so is,
    from its beginning, a stopped run of which only a part learns.

    Args:
        study: what was run.
        folder: gets `state.tar.00` and on, 15 MiB each.
        limit: bytes of all parts together.
        say: takes lines about progress.

    Returns:
        The parts.
    """
    root = Path(study.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "study"
        target.mkdir()
        _copy_results(study, target)
        for title, source, write in _weights(study):
            copy = target / source.relative_to(root)
            write(copy)
            if _size(target) > limit:
                say(f"pack: no room for {title}")
                shutil.rmtree(copy)
        archive = Path(scratch) / "state.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(target, arcname=".")
        return _split(archive, folder)


def _split(archive: Path, folder: Path) -> list[Path]:
    for old in folder.glob("state.tar.*"):
        old.unlink()
    parts: list[Path] = []
    with archive.open("rb") as file:
        while piece := file.read(PART_BYTES):
            parts.append(folder / _PART.format(index=len(parts)))
            parts[-1].write_bytes(piece)
    return parts


def unpack_study(folder: Path, output_dir: Path) -> bool:
    """Restores what `pack_study` wrote, unless the study's folder already has something in it.

    Returns:
        False if nothing was done.

    Raises:
        ValueError: `folder` holds no packed study, or one that would write elsewhere.
    """
    if output_dir.is_dir() and any(output_dir.iterdir()):
        return False
    parts = sorted(folder.glob("state.tar.*"))
    if not parts:
        raise ValueError(f"`unpack` must be a folder with state.tar.00, got {folder}")
    with tempfile.TemporaryFile() as whole:
        for part in parts:
            whole.write(part.read_bytes())
        whole.seek(0)
        output_dir.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=whole) as tar:
            _extract(tar, output_dir)
    return True


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Files and folders only, all below `folder`; `extractall` knows no such filter before Python
    3.11.4."""
    members = tar.getmembers()
    for member in members:
        inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
        if not (inside and (member.isfile() or member.isdir())):
            raise ValueError(f"`unpack` must hold files below its folder only, got {member.name}")
    for member in members:
        target = folder / member.name
        content = tar.extractfile(member)
        if content is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with content, target.open("wb") as file:
            shutil.copyfileobj(content, file)
