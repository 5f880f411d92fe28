"""The console script: which tool runs, with which words, and what it costs to ask for help."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lintra.tools import cli

TOOL = """
import argparse
def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--code", type=int)
    parser.add_argument("--name")
    print(parser.format_usage())
    options = parser.parse_args(argv)
    print("name", options.name)
    return options.code
"""


@pytest.fixture
def fake_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "lintra_fake_tool.py").write_text(TOOL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "fake", ("lintra_fake_tool", "a tool for this test"))
    yield
    sys.modules.pop("lintra_fake_tool", None)


@pytest.mark.usefixtures("fake_tool")
@pytest.mark.parametrize(("words", "code"), [(["--code", "3"], 3), ([], 0)])
def test_a_tool_gets_its_words_and_gives_the_code(words: list[str], code: int) -> None:
    assert cli.main(["fake", *words]) == code


@pytest.mark.usefixtures("fake_tool")
def test_a_tool_is_called_by_its_full_name(capsys: pytest.CaptureFixture[str]) -> None:
    words_before = list(sys.argv)
    assert cli.main(["fake", "--name", "x"]) == 0
    out = capsys.readouterr().out
    assert "usage: lintra fake " in out
    assert "name x" in out
    assert sys.argv == words_before


def test_an_unknown_command_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["destill"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "lintra: command must be one of distill, train, make-cache, memory-plan, sample,"
        " evaluate, train-backbone, convert, bench, demo, got 'destill'"
    )


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out and summary in out for name, (_, summary) in cli.COMMANDS.items())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lintra {importlib.metadata.version('lintra')}\n"


def test_an_unknown_option_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--verbose"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --verbose" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["destill"], ["--version"], []], ids=str)
def test_asking_does_not_import_torch(words: list[str]) -> None:
    code = f"""
import sys
from lintra.tools import cli
try:
    cli.main({words!r})
except SystemExit:
    pass
sys.exit("torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_console_script_is_this_function() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="lintra")
    assert script.load() is cli.main


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_tool_shows_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: lintra {name} " in capsys.readouterr().out
