"""Runs of a study as processes: several at once on each GPU, until all are done or time is up."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from ..training.metrics import read_metrics
from ..training.signals import StopRequest
from .config import TEACHER, Study
from .worker import forget_copies, is_finished, is_trained

# Seconds that a stopped process has to write its checkpoint.
GRACE = 20.0
# A process needs this long to import and build models: started later it would get nothing done.
LEAST = 40.0
# Seconds between lines about how far the runs are.
TELL_EVERY = 30.0
_POLL = 0.2
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_TAIL = 12


@dataclass
class Outcome:
    """How a call of `run_all` ended.

    Attributes:
        unfinished: runs that are to be gone on with.
        failed: last lines of the log of each run that ended with an error.
    """

    unfinished: list[str]
    failed: dict[str, str] = field(default_factory=dict)


class _Process:
    def __init__(self, command: Sequence[str], log: Path, threads: int, device: str | None):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.device = device
        self._file: IO[bytes] = log.open("ab")
        environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)
        if device is not None:
            environment[_VISIBLE] = device
        self._popen = subprocess.Popen(
            list(command), stdout=self._file, stderr=subprocess.STDOUT, env=environment
        )

    def poll(self) -> int | None:
        return self._popen.poll()

    def stop(self) -> None:
        if self.poll() is None:
            self._popen.terminate()

    def end(self, seconds: float) -> None:
        """Waits for the process, and kills it if it takes longer."""
        try:
            self._popen.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._file.close()

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_TAIL:])


def visible_gpus() -> list[str]:
    """The GPUs of this process, as `CUDA_VISIBLE_DEVICES` would name them one by one."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return named[:count] or [str(index) for index in range(count)]


def progress_of(study: Study, run: str) -> str:
    """` at step N of M, R images/s` by the last line of a run's metrics; "" before there is one."""
    rows = read_metrics(study.folder(run) / "metrics.jsonl")
    if not rows:
        return ""
    step, rate = rows[-1]["step"], rows[-1]["images_per_second"]
    return f" at step {step} of {study.steps(run)[-1]}, {rate:.0f} images/s"


def run_all(
    study: Study,
    command: Callable[[str], Sequence[str]],
    *,
    parallel: int = 1,
    stop_after: float = float("inf"),
    say: Callable[[str], None] = print,
) -> Outcome:
    """Trains and measures what is left of a study.

    Runs start in the study's order as soon as the models that they need are there, of as many steps
    as the study now asks for, each on the GPU with the fewest of them. When time is up, or this
    process gets SIGINT or SIGTERM, all get SIGTERM, on which a run in training leaves a checkpoint
    that the next call resumes.

    Args:
        study: what to run; finished runs are skipped.
        command: of the process that does one run.
        parallel: processes at once.
        stop_after: seconds until all processes have ended.
        say: takes lines about progress.
    """
    started = told = time.monotonic()
    forget_copies(study)
    needs = {run: study.needs(run) for run in study.runs}
    waiting = [run for run in study.runs if not is_finished(study, run)]
    running: dict[str, _Process] = {}
    outcome = Outcome([])
    threads = max(1, (os.cpu_count() or 1) // parallel)
    gpus = visible_gpus()

    def tell(event: str) -> None:
        say(f"{time.monotonic() - started:6.1f} s: {event}")

    def emptiest() -> str | None:
        taken = [process.device for process in running.values()]
        return min(gpus, key=taken.count, default=None)

    def left() -> float:
        return stop_after - GRACE - (time.monotonic() - started)

    with StopRequest() as stop:
        while (running or waiting) and stop.signum is None:
            for run in [run for run, process in running.items() if process.poll() is not None]:
                process = running.pop(run)
                process.end(0)
                if is_finished(study, run):
                    tell(f"{run} finished")
                else:
                    outcome.failed[run] = process.tail()
                    tell(f"{run} FAILED, see {process.log}")
            is_taught = is_trained(study, TEACHER)
            ready = [
                run
                for run in waiting
                if not needs[run] or (is_taught and all(folder.is_dir() for folder in needs[run]))
            ]
            for run in ready[: max(0, parallel - len(running))] if left() > LEAST else []:
                waiting.remove(run)
                log = study.folder(run) / "log.txt"
                running[run] = _Process(command(run), log, threads, emptiest())
                tell(f"{run} started")
            if time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                for run in running:
                    tell(f"{run}{progress_of(study, run)}")
            if left() <= 0 or (not running and (not ready or left() <= LEAST)):
                break
            time.sleep(_POLL)
        for process in running.values():
            process.stop()
        stopped = time.monotonic()
        for run, process in running.items():
            process.end(GRACE - (time.monotonic() - stopped))
            tell(f"{run} stopped{progress_of(study, run)}")
    outcome.unfinished = [run for run in study.runs if not is_finished(study, run)]
    return outcome
