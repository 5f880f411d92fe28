"""`lintra memory-plan`: memory that distilling FLUX.1-dev into CLEAR takes, counted or measured."""

import argparse
import sys
from collections.abc import Sequence

import torch

from lintra.diffusion.training.memory_measure import measure_step
from lintra.diffusion.training.memory_plan import flux_plans, format_plans


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table that is counted on the meta device, or what two steps on this GPU took."""
    parser = argparse.ArgumentParser(prog="lintra memory-plan", description=__doc__)
    parser.add_argument(
        "--measure", choices=("clear", "lora"), help="train two steps on this GPU, random weights"
    )
    parser.add_argument("--half", action="store_true", help="what learns is bfloat16, too")
    parser.add_argument("--rank", type=int, default=64, help="of lora")
    parser.add_argument("--radius", type=float, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    if options.measure is None:
        print(format_plans(flux_plans()))
        return 0
    if not torch.cuda.is_available():
        print("error: `--measure` must have a GPU, got none", file=sys.stderr)
        return 2
    measured = measure_step(
        device="cuda",
        trainable=options.measure,
        rank=options.rank,
        master_weights=not options.half,
        radius=options.radius,
        batch_size=options.batch_size,
    )
    print(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
