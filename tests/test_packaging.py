"""The wheel holds what git tracks: a package that pyproject.toml does not list would be missing."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from rooms import ROOMS, ROOT, project, room_files


def belongs_in_wheel(name: str) -> bool:
    return PurePosixPath(name).suffix in {".py", ".yaml"} or name.endswith("/py.typed")


def test_every_package_is_listed() -> None:
    folders = {PurePosixPath(name).parent for name in room_files() if name.endswith(".py")}
    listed = set(project()["tool"]["setuptools"]["packages"])
    existing = {".".join(["lintra", *folder.parts]) for folder in folders}
    assert existing - listed == set()
    assert listed - existing == set()


def test_every_room_has_its_folder_and_types() -> None:
    names = room_files()
    rooms = [room for room in ROOMS if f"{room}/__init__.py" in names]
    mapping = {f"lintra.{room}": room for room in rooms}
    assert project()["tool"]["setuptools"]["package-dir"] == mapping
    assert [room for room in rooms if f"{room}/py.typed" not in names] == []


def test_wheel_holds_every_module_and_recipe(tmp_path: Path) -> None:
    names = room_files()
    # Built from a copy of what git knows, so that the tree stays clean and ignored files stay out.
    tree = tmp_path / "tree"
    for name in [*names, "pyproject.toml", "README.md", "LICENSE"]:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    run = subprocess.run([*command, tree], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr

    (wheel,) = tmp_path.glob("lintra-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = set(archive.namelist()) - packed
    expected = {f"lintra/{name}" for name in names if belongs_in_wheel(name)}
    assert expected - packed == set()
    assert packed - expected == set()
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    assert any(name.endswith("/entry_points.txt") for name in metadata)
