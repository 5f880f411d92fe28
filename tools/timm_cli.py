"""`python -m lintra.tools.timm_cli SCRIPT ...`: timm's own scripts, with our models registered.

timm's train, validate and benchmark scripts are not in its wheel; SCRIPT is the path of one.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import lintra.vision  # noqa: F401 - registers the models


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script with the remaining words; exit code 2 without a script."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or not Path(words[0]).is_file():
        got = repr(words[0]) if words else "nothing"
        print(
            f"error: the first word must be the path of a timm script, got {got}", file=sys.stderr
        )
        return 2
    script = str(Path(words[0]).resolve())
    before, path_before = sys.argv, list(sys.path)
    sys.argv = [script, *words[1:]]
    # As `python SCRIPT` would: some scripts import their neighbours.
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before, path_before
    return 0


if __name__ == "__main__":
    sys.exit(main())
