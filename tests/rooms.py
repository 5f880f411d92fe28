"""The rooms of the house, as tests see them: folders, files that git knows, packages listed."""

import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest

from check_tree import ROOT, tracked_files

ROOMS = ("kernels", "vision", "diffusion", "configs", "tools")


def existing_rooms() -> list[str]:
    """Rooms that are packages by now."""
    return [room for room in ROOMS if (ROOT / room / "__init__.py").is_file()]


def room_files() -> list[str]:
    """Files of all rooms that git knows; skips the test outside a checkout (an unpacked sdist)."""
    try:
        names = tracked_files()
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip(f"needs git and a checkout of the repository at {ROOT}")
    return [name for name in names if PurePosixPath(name).parts[0] in ROOMS]


def project() -> dict:
    """pyproject.toml."""
    return tomllib.loads(Path(ROOT, "pyproject.toml").read_text())
