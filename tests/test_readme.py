"""The README tells the truth: its Python runs, its tables name what is there.

A block that cannot run here, say for want of a checkpoint, has `<!-- not run: why -->` on the line
before it.
"""

import re

import pytest

from lintra.tools.cli import COMMANDS
from rooms import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```$", README, re.M | re.S)
RUNNABLE = [code for excuse, code in BLOCKS if not excuse]


@pytest.mark.parametrize("code", RUNNABLE, ids=[f"block{i}" for i in range(len(RUNNABLE))])
def test_python_runs(
    code: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("readme"))
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_tables_name_every_command_and_recipe() -> None:
    rows = [f"| `lintra {name}` | `{module}` |" for name, (module, _) in COMMANDS.items()]
    configs = ROOT / "configs"
    rows += [f"| `{file.relative_to(configs)}` |" for file in configs.glob("*.yaml")]
    assert [row for row in rows if row not in README] == []
    named = re.findall(r"^\| `([\w/]+\.yaml)` \|", README, re.M)
    assert [name for name in named if not (configs / name).is_file()] == []
