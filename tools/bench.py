"""`lintra bench`: speed of operations and models against their peers, after a correctness check."""

import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .benchmark.case import Case
    from .benchmark.runner import Settings

OPERATIONS = {
    "linear_attention": "linear_attention",
    "token_conv2d": "token_conv",
    "local_attention": "local_attention",
    "ada_layer_norm": "ada_layer_norm",
    "rotary_rms_norm": "rotary_rms_norm",
    "stacked_linear": "stacked_linear",
}
MODEL_NAMES = ("inline_deit", "slab_deit", "lit")
NAMES = (*OPERATIONS, *MODEL_NAMES, "models", "clear", "lit_pixart")
PEERS = ("sdpa", "eager", "compiled", "cudnn", "flex", "timm", "dit", "pixart")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def _integers(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise ArgumentTypeError(f"must be integers with commas between, got {words!r}") from None


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lintra bench", description=__doc__)
    parser.add_argument("name", metavar="OP|MODEL", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--device", default="cuda", help="cuda or cpu; cpu takes tiny shapes")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--shape",
        type=_integers,
        action="append",
        help="a shape instead of the table's, can be repeated; linear_attention: B,N,H,D;"
        " token_conv2d: B,h,w,C,k[,residual[,per_sample]]; models: pixels,batch; clear:"
        " pixels,radius; local_attention: side,radius[,H,D,prefix[,pooled]]; ada_layer_norm:"
        " B,N,C[,gated (2: the sum alone)]; rotary_rms_norm: B,N,H,D;"
        " stacked_linear: G,B,K,F",
    )
    parser.add_argument("--only", default="", help="cases whose label holds this text")
    parser.add_argument("--direction", nargs="+", choices=("fwd", "bwd", "fwd+bwd"), default=())
    parser.add_argument("--training", action="store_true", help="models: a training step")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a GPU too")
    parser.add_argument("--compile-mode", choices=MODES, default=MODES[0], help="of both models")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="lit, lit_pixart: compile models whole, not block by block; modes with CUDA graphs do",
    )
    parser.add_argument("--no-compile", action="store_true", help="no peer and no model compiled")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=(), help="these only")
    parser.add_argument("--calls", type=int, default=20, help="timed calls of a measurement")
    parser.add_argument("--seconds", type=float, default=3.0, help="at most, a measurement")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for peers")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bench"), help="CSV and plot")
    parser.add_argument("--markdown", type=Path, help="write a table for docs/performance.md here")
    parser.add_argument("--commit", help="what to call the code where git cannot be asked")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if our implementation is wrong, before any speed is shown; 2 for a bad call; 130
    for one that was interrupted, with the tables of what had been measured."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(words)
    try:
        if options.name not in NAMES:
            raise ValueError(f"`name` must be one of {', '.join(NAMES)}, got {options.name!r}")
        settings = _settings(options)
        cases = _cases(options, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from .benchmark.case import OURS
    from .benchmark.environment import describe
    from .benchmark.plot import write_plot
    from .benchmark.report import markdown, text, write_csv
    from .benchmark.runner import CheckFailed, Interrupted, run_cases

    interrupted = False
    try:
        bandwidth, rows = run_cases(cases, settings)
    except CheckFailed as error:
        print(f"error: wrong result, so no speed: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        interrupted, bandwidth, rows = True, error.bandwidth, error.rows
    command = shlex.join(["lintra", "bench", *words])
    environment = describe(settings.device, options.dtype, command, bandwidth, options.commit)
    stem = options.output_dir / options.name
    write_csv(stem.with_suffix(".csv"), rows, environment)
    write_plot(stem.with_suffix(".png"), rows, environment)
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(options.name, rows, environment))
    print(text(rows, environment))
    if interrupted:
        print("interrupted: the tables have what had been measured", file=sys.stderr)
        return 130
    return int(any(row.impl == OURS and row.times is None for row in rows))


def _settings(options: Namespace) -> "Settings":
    import torch

    from .benchmark.device import open_device
    from .benchmark.runner import Settings
    from .benchmark.timing import Limits

    for name in ("calls", "seconds", "budget"):
        if not getattr(options, name) > 0:
            raise ValueError(f"`{name}` must be positive, got {getattr(options, name)}")
    return Settings(
        device=open_device(options.device),
        dtype=getattr(torch, options.dtype),
        limits=Limits(calls=options.calls, seconds=options.seconds),
        use_compile=not options.no_compile,
        budget=options.budget,
        directions=options.direction,
        peers=options.peers,
        say=lambda line: None if options.quiet else print(line, file=sys.stderr, flush=True),
    )


def _cases(options: Namespace, settings: "Settings") -> "list[Case]":
    tiny = options.tiny or settings.device.type == "cpu"
    if options.name in OPERATIONS:
        module = import_module(f".benchmark.{OPERATIONS[options.name]}", __package__)
        cases = [module.build(x) for x in options.shape] if options.shape else module.cases(tiny)
    else:
        from .benchmark import clear, lit, lit_pixart, models

        mode = models.Mode(
            settings.device,
            settings.dtype,
            compile_mode=None if options.no_compile else options.compile_mode,
            training=options.training,
            tiny=tiny,
            whole=options.whole,
        )
        names = MODEL_NAMES if options.name == "models" else (options.name,)
        own = {"clear": clear, "lit": lit, "lit_pixart": lit_pixart}
        cases = []
        for name in names:
            if name in own:
                cases += own[name].cases(mode, options.shape)
            else:
                cases += models.cases([name], mode, options.shape)
    chosen = [case for case in cases if options.only in str(case)]
    if not chosen:
        labels = ", ".join(map(str, cases))
        raise ValueError(f"`only` must be part of one of {labels}, got {options.only!r}")
    found = ", ".join(dict.fromkeys(name for case in chosen for name in case.directions))
    if options.direction and not set(options.direction) & set(found.split(", ")):
        raise ValueError(f"`direction` must be one of {found}, got {' '.join(options.direction)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
