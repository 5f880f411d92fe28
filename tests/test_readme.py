"""The README tells the truth: its Python runs, its tables name what is there.

The blocks of a section run in order and share their names, as a reader would type them. A block
that cannot run here, say for want of a checkpoint, has `<!-- not run: why -->` on the line before
it.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from lintra.tools import cli
from lintra.tools.cli import COMMANDS
from rooms import ROOT

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)^```$", re.M | re.S)
SECTIONS = {
    text.partition("\n")[0]: [code for excuse, code in BLOCK.findall(text) if not excuse]
    for text in README.split("\n## ")
}
# Words after the program of each command, and the module of those that are no part of `lintra`.
COMMAND = re.compile(r"^(?:lintra|.*-m (lintra\.tools\.\w+)) (.*)$", re.M)
COMMAND_LINES = [
    (module, words)
    for block in re.findall(r"^```bash\n(.*?)^```$", README, re.M | re.S)
    for module, words in COMMAND.findall(block.replace("\\\n", " "))
]
RUNNABLE = {title: blocks for title, blocks in SECTIONS.items() if blocks}


def test_every_block_is_found() -> None:
    assert len(BLOCK.findall(README)) == README.count("```python")


@pytest.mark.parametrize("title", RUNNABLE)
def test_python_runs(
    title: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("readme"))
    names = {"__name__": "readme"}
    for code in RUNNABLE[title]:
        exec(compile(code, "README.md", "exec"), names)


@pytest.mark.parametrize(("module", "words"), COMMAND_LINES)
def test_commands_lack_no_more_than_their_files(
    module: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Options, recipes and their fields are there: only the reader's own files are missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tool = importlib.import_module(module) if module else cli
    try:
        code = tool.main(shlex.split(words))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    # Wrong options and fields have other messages.
    pattern = r"must (exist|be an existing|be a pipeline folder)\b|File does not exist"
    assert re.search(pattern, capsys.readouterr().err)


def test_tables_name_every_command_and_recipe() -> None:
    rows = [f"| `lintra {name}` | `{module}` |" for name, (module, _) in COMMANDS.items()]
    configs = ROOT / "configs"
    rows += [f"| `{file.relative_to(configs)}` |" for file in configs.glob("*.yaml")]
    assert [row for row in rows if row not in README] == []
    named = re.findall(r"^\| `([\w/]+\.yaml)` \|", README, re.M)
    assert [name for name in named if not (configs / name).is_file()] == []
