"""The checks of `make lint` that ruff does not make."""

import subprocess
from pathlib import Path

import pytest

import check_tree


def repository(root: Path, files: dict[str, str]) -> Path:
    subprocess.run(["git", "init", "--quiet", root], check=True)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.py", "x = 1\n" * 501, "a.py:501: must have at most 500 lines, got 501"),
        ("a.md", "fine\ncaf\u00e9\n", "a.md:2: must be ASCII, got '\\xe9'"),
        # Cut in two: this file is checked too.
        ("k.py", "p = tl.make_" + "block_ptr(x)\n", "k.py:1: must not hold 'make_block"),
        ("t.py", "import pd" + "b\n", "t.py:1: must not hold 'pd"),
        ("t.py", "break" + "point()\n", "t.py:1: must not hold 'breakpoint"),
        ("r.yaml", "path: /ho" + "me/me/x\n", "r.yaml:1: must not hold '/ho"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, problem: str
) -> None:
    assert check_tree.main(repository(tmp_path, {name: text})) == 1
    assert problem in capsys.readouterr().out


def test_good_and_ignored_files_pass(tmp_path: Path) -> None:
    files = {
        "kernels/local_attention/configs.py": "x = 1\n" * 900,
        "a.py": "url = 'https://example.org/home/page'\n" * 500,
        "tensor.bin": "\0\u00e9",
        ".gitignore": "runs/\n",
        "runs/log.txt": "/ho" + "me/me\n",
    }
    assert check_tree.main(repository(tmp_path, files)) == 0
