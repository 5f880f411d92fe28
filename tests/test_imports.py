"""Which way the arrows run, and what an import must not bring along."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from rooms import ROOMS, ROOT, existing_rooms, room_files

# Heavy packages that `import lintra.<room>` must leave alone.
NOT_BROUGHT = {
    "kernels": {"triton", "timm", "diffusers", "transformers"},
    "vision": {"diffusers", "transformers"},
    "configs": {"torch"},
    "tools": {"torch"},
}

# tools -> configs, tools -> {vision, diffusion} -> kernels.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "vision": {"vision", "kernels"},
    "diffusion": {"diffusion", "kernels"},
    "configs": {"configs"},
    "tools": set(ROOMS),
}

# Torch comes first: what a release of it brings by itself is not ours to answer for.
PROBE = """
import json, sys
if {torch_first}:
    import torch
before = set(sys.modules)
import lintra.{room}
print(json.dumps(sorted({{name.split(".")[0] for name in set(sys.modules) - before}})))
"""


@pytest.mark.parametrize("room", [room for room in existing_rooms() if room in NOT_BROUGHT])
def test_import_brings_no_heavy_package(room: str) -> None:
    code = PROBE.format(room=room, torch_first="torch" not in NOT_BROUGHT[room])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert NOT_BROUGHT[room].isdisjoint(json.loads(run.stdout))


def imported_names(source: str, package: list[str]) -> Iterator[str]:
    """Dotted names that `source`, a module of `package`, imports anywhere, also in functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*stem, alias.name]) for alias in node.names)


def rooms_imported(source: str, package: list[str]) -> set[str]:
    paths = [name.split(".") for name in imported_names(source, package)]
    return {path[1] for path in paths if path[0] == "lintra" and len(path) > 1}


def test_rooms_import_only_what_the_design_allows() -> None:
    wrong = []
    for name in room_files():
        path = PurePosixPath(name)
        if path.suffix == ".py":
            imported = rooms_imported((ROOT / name).read_text(), ["lintra", *path.parent.parts])
            wrong += [f"{name} imports {room}" for room in imported - MAY_IMPORT[path.parts[0]]]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import lintra.vision.fold", {"vision"}),
        ("from lintra import diffusion", {"diffusion"}),
        ("from lintra.kernels.token_conv import api", {"kernels"}),
        ("def f():\n    from .. import tools", {"tools"}),
        ("from ..configs import x", {"configs"}),
        ("from .api import x", {"kernels"}),
        ("import torch, timm.layers", set()),
    ],
)
def test_rooms_imported_sees_every_form(source: str, expected: set[str]) -> None:
    assert rooms_imported(source, ["lintra", "kernels"]) == expected
