"""`python -m lintra.tools.diffusion_study`: what it refuses, and a run in its own process."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from lintra.diffusion.study.config import TEACHER
from lintra.tools import diffusion_study
from tiny_study import make_study


@pytest.fixture
def config(tmp_path: Path) -> Path:
    study = make_study(tmp_path, teacher_steps=2)
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(asdict(study)))
    return file


def test_a_run_of_its_own_and_a_report(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diffusion_study.main(["--config", str(config), "--run", TEACHER]) == 0
    # No time for another run: a report of what there is.
    words = ["--config", str(config), "--stop-after", "1", "--pack", str(config.parent / "pack")]
    words += ["--table", str(config.parent / "results" / "lit.md")]
    assert diffusion_study.main(words) == 0
    out = capsys.readouterr().out
    assert "| DiT teacher | 2 |" in out
    assert "| DiT teacher | 2 |" in (config.parent / "results" / "lit.md").read_text()
    assert "to be gone on with: scratch, hybrid, softmax" in out
    assert (config.parent / "pack" / "state.tar.00").is_file()
    assert "Not measured yet: scratch at 1" in (config.parent / "study" / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parallel", "0"], "error: `parallel` must be positive, got 0"),
        (["--only", "x"], "error: `only` must name arms of scratch, hybrid, softmax, got ['x']"),
        (
            ["--unpack", "nowhere"],
            "error: `unpack` must be a folder with state.tar.00, got nowhere",
        ),
    ],
)
def test_mistakes(
    words: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diffusion_study.main(["--config", str(config), *words]) == 2
    assert capsys.readouterr().err.strip() == message


def test_a_wrong_field_of_an_arm_stops_before_any_run(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = json.loads(config.read_text())
    study["arms"]["hybrid"]["set"] = {"training.speed": 3}
    config.write_text(json.dumps(study))
    with pytest.raises(SystemExit) as stop:
        diffusion_study.main(["--config", str(config)])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "recipe of hybrid" in err
    assert "training.speed" in err
    assert not (config.parent / "study").exists()
