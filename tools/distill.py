"""`lintra distill`: turns a pretrained DiT into a linear student, as a recipe says."""

import logging
import sys
from collections.abc import Sequence

from lintra.diffusion.training.config import Recipe, parse_recipe
from lintra.diffusion.training.loop import Trainer, TrainingDiverged, TrainingResult

# What the shell reports of a process that a signal ended.
_SIGNAL_EXIT = 128


def run_recipe(recipe: Recipe) -> tuple[int, TrainingResult | None]:
    """Trains, prints where the results are or why there are none, and gives the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    try:
        trainer = Trainer(recipe)
    except (ValueError, OSError) as error:  # diffusers' own errors about files are OSErrors
        print(f"error: {error}", file=sys.stderr)
        return 2, None
    try:
        result = trainer.run()
    except TrainingDiverged as error:
        print(f"error: training diverged: {error}", file=sys.stderr)
        return 1, None
    if result.signum is not None:
        print(f"stopped at step {result.step}; resume with", file=sys.stderr)
        print(f"  --checkpoint.resume_from_checkpoint {result.checkpoint}", file=sys.stderr)
        return _SIGNAL_EXIT + result.signum, result
    if trainer.is_main:
        print(f"{result.step} steps done; pipeline: {result.pipeline}")
    return 0, result


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 2 for a wrong recipe, 1 if diverged, 128 + signal if stopped."""
    words = sys.argv[1:] if argv is None else argv
    recipe = parse_recipe(words, "lintra distill", "Distils a pretrained DiT into a linear one.")
    if recipe.model.pretrained_teacher_model is None:
        print(
            "error: `model.pretrained_teacher_model` must be a pipeline folder, got none"
            " (lintra train trains without a teacher)",
            file=sys.stderr,
        )
        return 2
    return run_recipe(recipe)[0]


if __name__ == "__main__":
    sys.exit(main())
