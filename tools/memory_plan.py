"""`lintra memory-plan`: memory that distilling FLUX.1-dev into CLEAR takes, without a GPU."""

import argparse
import sys
from collections.abc import Sequence

from lintra.diffusion.training.memory_plan import flux_plans, format_plans


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table; counted on the meta device."""
    parser = argparse.ArgumentParser(prog="lintra memory-plan", description=__doc__)
    parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    print(format_plans(flux_plans()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
