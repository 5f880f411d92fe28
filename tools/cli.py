"""The console script `lintra`: hands the rest of the command line to one tool."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

# Each module has `main(argv) -> int | None` and also runs as `python -m <module>`.
COMMANDS: dict[str, tuple[str, str]] = {
    "distill": ("lintra.tools.distill", "turn a pretrained DiT into a linear one"),
    "train": ("lintra.tools.train", "train a model without a teacher"),
    "make-cache": ("lintra.tools.make_cache", "latents and prompt embeddings for training"),
    "memory-plan": ("lintra.tools.memory_plan", "memory that distilling FLUX.1-dev takes"),
    "sample": ("lintra.tools.sample", "draw a grid of images from a pipeline folder"),
    "evaluate": ("lintra.tools.evaluate", "compare a pipeline's images with real ones"),
    "train-backbone": ("lintra.tools.train_backbone", "train a vision backbone"),
    "convert": ("lintra.tools.convert", "official checkpoints for timm and diffusers"),
    "bench": ("lintra.tools.bench", "time operations and models against their peers"),
    "demo": ("lintra.tools.demo", "teacher, distilled LiT and two controls on digits"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool that the first word names.

    Args:
        argv: words after the program's name; None = those of this process.

    Returns:
        The exit code: that of the tool, 2 without a known command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        _parser().print_help(sys.stderr)
        return 2
    name, rest = words[0], words[1:]
    if name.startswith("-"):
        _parser().parse_args([name])
    if name not in COMMANDS:
        names = ", ".join(COMMANDS)
        print(f"lintra: command must be one of {names}, got {name!r}", file=sys.stderr)
        return 2
    return _run(name, rest)


def _run(name: str, argv: list[str]) -> int:
    # Only the chosen module is imported: help and mistakes must not wait for torch.
    tool = importlib.import_module(COMMANDS[name][0])
    words_before = sys.argv
    # argparse takes the name in "usage: lintra distill ..." from here.
    sys.argv = [f"lintra {name}", *argv]
    try:
        return tool.main(argv) or 0
    finally:
        sys.argv = words_before


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="lintra",
        usage="lintra [-h] [--version] command ...",
        epilog="\n".join(["commands:", *rows, "", "`lintra <command> --help` tells more."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lintra {version('lintra')}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
