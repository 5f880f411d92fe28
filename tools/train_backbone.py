"""`lintra train-backbone`: trains a vision backbone, as a recipe says."""

import logging
import sys
from collections.abc import Sequence

from lintra.vision.training.config import parse_recipe
from lintra.vision.training.loop import BackboneTrainer, TrainingDiverged

# What the shell reports of a process that a signal ended.
_SIGNAL_EXIT = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 2 for a wrong recipe, 1 if diverged, 128 + signal if stopped."""
    words = sys.argv[1:] if argv is None else argv
    recipe = parse_recipe(words, "lintra train-backbone", "Trains a vision backbone.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        trainer = BackboneTrainer(recipe)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        result = trainer.run()
    except TrainingDiverged as error:
        print(f"error: training diverged: {error}", file=sys.stderr)
        return 1
    if result.signum is not None:
        print(f"stopped at step {result.step}; resume with", file=sys.stderr)
        print(f"  --checkpoint.resume {result.checkpoint}", file=sys.stderr)
        return _SIGNAL_EXIT + result.signum
    if trainer.is_main:
        accuracy = "not measured" if result.accuracy is None else f"{result.accuracy:.2f} %"
        print(f"{result.step} steps done; best top-1 {accuracy}; model: {result.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
