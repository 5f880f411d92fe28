"""`python -m lintra.tools.diffusion_study`: a teacher and students that differ in one thing each.

LiT from DiT, of classes; CLEAR from FLUX or SD3, with class names as prompts.

Trains, samples and measures every run of a study file (see `configs/diffusion/`), several at once
on each GPU, and writes a table, loss curves and pictures. The same command goes on where the last
one stopped.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lintra.diffusion.study.config import check_study, parse_study
from lintra.diffusion.study.data import make_cache
from lintra.diffusion.study.pack import pack_study, unpack_study
from lintra.diffusion.study.report import write_report
from lintra.diffusion.study.scheduler import run_all
from lintra.diffusion.study.worker import measure_speed, train_and_measure

_PROG = "python -m lintra.tools.diffusion_study"
# What a process of the study, started by another, exits with after a signal.
_SIGNAL_EXIT = 128


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description=__doc__.partition("\n")[0],
        epilog="Further words are overrides of the study, e.g. --teacher_steps 6000.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the study, a YAML file")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms, beside the teacher")
    parser.add_argument("--parallel", type=int, default=3, help="processes at once, over all GPUs")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds; exits 0")
    parser.add_argument("--table", type=Path, help="Markdown file for the report, and its pictures")
    parser.add_argument("--speed", action="store_true", help="also measure forward passes")
    parser.add_argument("--unpack", type=Path, help="folder of a packed study to start from")
    parser.add_argument("--pack", type=Path, help="folder to pack the study into at the end")
    parser.add_argument("--pack-limit", type=float, default=40.0, help="MB of the packed study")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when done or when time is up, 1 if a run failed, 2 for a wrong study."""
    started = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    options, overrides = _parser().parse_known_args(words)
    # What defines the results; other options say how much is done, and where it is written.
    defining = ["--config", options.config, *overrides]
    study = parse_study(defining, _PROG, "")
    same = [sys.executable, "-m", "lintra.tools.diffusion_study", *defining]
    if options.run is not None:
        signum = train_and_measure(study, options.run)
        return 0 if signum is None else _SIGNAL_EXIT + signum
    try:
        if options.parallel < 1:
            raise ValueError(f"`parallel` must be positive, got {options.parallel}")
        if options.unpack is not None:
            unpack_study(options.unpack, Path(study.output_dir))
        only = study.select(options.only)
        check_study(only)
        make_cache(only)
        outcome = run_all(
            only,
            lambda run: [*same, "--run", run],
            parallel=options.parallel,
            stop_after=options.stop_after - (time.monotonic() - started),
            say=lambda line: print(line, flush=True),
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.speed:
        measure_speed(study, compiled=True)
    table = write_report(study, f"{_PROG} {shlex.join(defining)}", outcome.failed, options.table)
    print(f"\n{table}\nresults: {study.output_dir}", flush=True)
    if options.pack is not None:
        parts = pack_study(study, options.pack, limit=int(options.pack_limit * 1e6))
        print(f"packed: {sum(part.stat().st_size for part in parts) / 1e6:.1f} MB", flush=True)
    for run, tail in outcome.failed.items():
        print(f"--- {run} failed:\n{tail}", file=sys.stderr)
    if outcome.unfinished:
        print(f"to be gone on with: {', '.join(outcome.unfinished)}")
    return int(bool(outcome.failed))


if __name__ == "__main__":
    sys.exit(main())
