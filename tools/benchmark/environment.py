"""GPU, versions, commit and date of a run."""

import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .report import Environment


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """Short commit of the checkout that holds this file, + where its files differ from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        answers = [
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answers[0].strip() + ("+" if answers[1].strip() else "")


def describe(
    device: torch.device, dtype: str, command: str, bandwidth: float, commit: str | None = None
) -> Environment:
    """The environment of a run that has just ended."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Environment(
        gpu=gpu,
        torch=torch.__version__,
        triton=_triton(),
        commit=commit or _commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
        dtype=dtype,
        bandwidth=bandwidth,
    )
