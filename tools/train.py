"""`lintra train`: trains a DiT or LiT from scratch, as a recipe says."""

import sys
from collections.abc import Sequence

from lintra.diffusion.training.config import parse_recipe

from .distill import run_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as of `lintra distill`."""
    words = sys.argv[1:] if argv is None else argv
    recipe = parse_recipe(words, "lintra train", "Trains a DiT or LiT without a teacher.")
    if recipe.model.pretrained_teacher_model is not None:
        print(
            "error: `model.pretrained_teacher_model` must be none, got"
            f" {recipe.model.pretrained_teacher_model!r} (lintra distill trains with a teacher)",
            file=sys.stderr,
        )
        return 2
    return run_recipe(recipe)[0]


if __name__ == "__main__":
    sys.exit(main())
