"""`python -m lintra.tools.backbone_study`: attention and norm variants under one recipe.

Every arm is the recipe with other `model.args`; each runs with each seed, several at once if the
device has room. The table has the last accuracy after recalibration, mean and deviation over seeds,
and images a second before and after folding, measured when no run is left. A finished run is not
repeated; with `--no-training` none begins.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lintra.vision.training.config import parse_recipe
from lintra.vision.training.study import ARMS, DEFAULT_ARMS, Stopped, arm_recipe, table, train_all


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lintra.tools.backbone_study",
        description=__doc__.partition("\n")[0],
        epilog="Further words are overrides of the recipe, e.g. --training.epochs 30.",
    )
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=DEFAULT_ARMS, choices=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument(
        "--no-training", action="store_true", help="the table of what is there, all speeds"
    )
    parser.add_argument("--table", help="file for the table, beside printing it")
    parser.add_argument("--throughput-batch", type=int, default=256)
    parser.add_argument("--throughput-seconds", type=float, default=2.0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for a wrong recipe, 128 + signal if stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    options, overrides = _parser().parse_known_args(words)
    recipe = parse_recipe(["--config", options.config, *overrides], "backbone_study", "")
    command = f"python -m lintra.tools.backbone_study {shlex.join(words)}"
    runs = {arm: [arm_recipe(recipe, arm, seed) for seed in options.seeds] for arm in options.arms}
    try:
        # One seed of every arm first: a study that is cut short still compares.
        rows = [] if options.no_training else zip(*runs.values(), strict=True)
        train_all([run for each in rows for run in each], options.jobs)
        text = table(
            runs, command, batch_size=options.throughput_batch, seconds=options.throughput_seconds
        )
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if options.table is not None:
        Path(options.table).parent.mkdir(parents=True, exist_ok=True)
        Path(options.table).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
