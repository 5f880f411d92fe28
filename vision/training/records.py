"""What a run leaves on disk: metrics.jsonl and checkpoints, written whole or not at all."""

import json
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any, Self

from accelerate import Accelerator

_PREFIX = "checkpoint-"
_STATE_FILE = "run.json"


class MetricsFile:
    """One JSON object a line. Opening it for a resumed run drops what lies after its step."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= first_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, none if there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [
        path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def resolve_checkpoint(choice: str | None, folder: Path) -> Path | None:
    """The checkpoint to resume from: `choice`, the newest for `latest`, None to start anew.

    Raises:
        ValueError: not a finished checkpoint.
    """
    if choice is None:
        return None
    if choice == "latest":
        return next(iter(list_checkpoints(folder)[::-1]), None)
    if not (Path(choice) / _STATE_FILE).is_file():
        raise ValueError(f"`checkpoint.resume` must be a checkpoint folder, got {choice!r}")
    return Path(choice)


def save_checkpoint(
    accelerator: Accelerator, folder: Path, state: dict[str, Any], limit: int | None
) -> Path:
    """Writes `checkpoint-{step}` with everything that `accelerator` holds, and `state`."""
    target = folder / f"{_PREFIX}{state['step']}"
    partial = target.with_name(f"{target.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / _STATE_FILE).write_text(json.dumps(state))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in list_checkpoints(folder)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Restores a checkpoint and returns its `state`.

    Raises:
        ValueError: a file is missing or damaged, or belongs to another model.
    """
    try:
        state = json.loads((folder / _STATE_FILE).read_text())
        accelerator.load_state(str(folder))
    except Exception as error:  # safetensors, zip, pickle and json each have their own
        raise ValueError(
            f"`checkpoint.resume` must be a whole checkpoint of this recipe's model,"
            f" got {str(folder)!r}: {error}"
        ) from error
    return state


class StopRequest:
    """Context in which SIGINT and SIGTERM only set `signum`; a second SIGINT interrupts at once."""

    signum: int | None = None

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
