"""Image files are decoded once: by one process, and not again while they stay as they are."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lintra.diffusion.training import verification
from lintra.diffusion.training.images import open_images
from lintra.diffusion.training.verification import SharedVerifier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(4):
        file = tmp_path / "images" / f"class{index % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(file)
    (tmp_path / "images" / "class0" / "broken.png").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded."""
    names: list[str] = []
    original = verification.is_readable

    def counted(file: Path, resolution: int) -> bool:
        names.append(file.name)
        return original(file, resolution)

    monkeypatch.setattr(verification, "is_readable", counted)
    return names


def verifier(file: Path, *, is_main: bool = True, num_processes: int = 1) -> SharedVerifier:
    process = SimpleNamespace(is_main_process=is_main, num_processes=num_processes)
    return SharedVerifier(process, file)  # type: ignore[arg-type]


def kept(folder: Path, verify: SharedVerifier) -> tuple[int, list[str]]:
    source = open_images("imagefolder", path=folder, resolution=8, verify=verify)
    return len(source), [file.name for file in source.broken]


def test_a_verdict_is_remembered(folder: Path, decoded: list[str], tmp_path: Path) -> None:
    file = tmp_path / "run" / "images.verified.json"
    first = verifier(file)
    assert kept(folder, first) == (4, ["broken.png"])
    assert len(decoded) == 5
    assert not file.exists()  # a recipe that is wrong leaves nothing behind
    first.save()
    again = verifier(file)
    assert kept(folder, again) == (4, ["broken.png"])
    assert len(decoded) == 5
    again.save()

    changed = folder / "class1" / "1.png"
    os.utime(changed, ns=(0, 0))
    assert kept(folder, verifier(file)) == (4, ["broken.png"])
    assert len(decoded) == 10
    (folder / "class1" / "new.png").write_text("nor this")
    assert kept(folder, verifier(file)) == (4, ["broken.png", "new.png"])

    file.write_text("{")
    assert kept(folder, verifier(file))[0] == 4


def test_other_processes_wait_for_the_verdict(
    folder: Path, decoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list] = []

    def broadcast(objects: list) -> None:
        if objects == [None]:
            objects[:] = sent[0]
        else:
            sent.append(list(objects))

    monkeypatch.setattr(verification, "broadcast_object_list", broadcast)
    file = tmp_path / "run" / "images.verified.json"
    assert kept(folder, verifier(file, num_processes=2)) == (4, ["broken.png"])
    other = verifier(file, is_main=False, num_processes=2)
    assert kept(folder, other) == (4, ["broken.png"])
    assert len(decoded) == 5
    other.save()
    assert not file.exists()
