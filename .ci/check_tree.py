"""Rules for the tree that ruff does not know: file lengths, ASCII, words that must not stay."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500

# Written so that no pattern matches its own line.
FORBIDDEN = {
    re.compile(r"make_block[_]ptr"): "block pointers are deprecated in Triton, use pointers",
    re.compile(r"\bpd[b]\b|\bbreakpoin[t]\("): "a debugger call",
    re.compile(r"(?<![\w.])/(?:home|root|work|Users)/"): "an absolute path of one machine",
}


def tracked_files(root: Path = ROOT) -> list[str]:
    """Paths that git tracks, or would track once added, relative to `root`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return sorted({name for name in run.stdout.split("\0") if name and (root / name).is_file()})


def is_launch_table(name: str) -> bool:
    """Measured launch tables, `kernels/<operation>/configs.py`, may be of any length."""
    return PurePosixPath(name).match("kernels/*/configs.py")


def problems(root: Path, name: str) -> Iterator[str]:
    """What is wrong with one file, each as `path:line: reason`."""
    data = (root / name).read_bytes()
    if b"\0" in data:  # a picture or a tensor file
        return
    lines = data.decode("utf-8", errors="replace").splitlines()
    if name.endswith(".py") and len(lines) > MAX_LINES and not is_launch_table(name):
        yield f"{name}:{MAX_LINES + 1}: must have at most {MAX_LINES} lines, got {len(lines)}"
    for number, line in enumerate(lines, start=1):
        if not line.isascii():
            others = "".join(sorted({c for c in line if not c.isascii()}))
            yield f"{name}:{number}: must be ASCII, got {others!a}"
        for pattern, reason in FORBIDDEN.items():
            if found := pattern.search(line):
                yield f"{name}:{number}: must not hold {found.group()!r}: {reason}"


def main(root: Path = ROOT) -> int:
    names = tracked_files(root)
    found = [problem for name in names for problem in problems(root, name)]
    print("\n".join([*found, f"check_tree: {len(names)} files, {len(found)} problems"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
