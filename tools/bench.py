"""Times an operation against its peers: `lintra bench OPERATION`; wrong results give no numbers."""

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")
DIRECTIONS = {"forward": 1, "backward": 2, "both": 3}  # floors, in units of the forward pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operation", help="a name of tools/bench_registry.py, or 'list'")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="default: all; on a CPU, tiny")
    parser.add_argument("--peers", nargs="*", metavar="PEER", help="default: all")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None, help="default: a GPU")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each")
    parser.add_argument("--csv", type=Path, help="file for one row a measurement")
    parser.add_argument("--plot", type=Path, help="file for bars of time over floor")
    return parser


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def _measure(options: argparse.Namespace, operation, names: list[str]) -> list[dict]:
    import torch

    from lintra.tools import bench_timing as timing

    cuda, dtype = options.device == "cuda", getattr(torch, options.dtype)
    bandwidth = timing.copy_bandwidth(options.device)
    where = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "triton": getattr(__import__("triton"), "__version__", "") if find_spec("triton") else "",
        "commit": _commit(),
    }
    print(f"{where}, copy {bandwidth / 1e6:.2f} TB/s", flush=True)
    rows: list[dict] = []
    for case in names:
        sizes = operation.cases[case]
        moved = operation.moved(sizes) * dtype.itemsize
        sets = min(6, max(2, -(-timing.ROTATED_BYTES // moved))) if cuda else 1
        inputs = [operation.inputs(sizes, options.device, dtype) for _ in range(sets)]
        functions = operation.functions(sizes)
        chosen = ["lintra", *(options.peers if options.peers is not None else list(functions)[1:])]
        for direction in options.directions:
            own = None
            for name in chosen:
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                try:
                    calls = timing.calls_of(functions[name], inputs, direction)
                    p20, p50, p80 = timing.time_calls(calls, options.device, options.repeats)
                    del calls
                except torch.OutOfMemoryError:
                    print(f"{case:14} {direction:9} {name:9} out of memory", flush=True)
                    continue
                own = p50 if own is None else own
                floor = DIRECTIONS[direction] * moved / bandwidth
                peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
                row = {
                    "operation": options.operation, "case": case, "impl": name,
                    "sizes": "x".join(map(str, sizes)), "dtype": options.dtype,
                    "direction": direction, "p20_us": p20, "p50_us": p50, "p80_us": p80,
                    "floor_us": floor, "percent_of_floor": 100 * floor / p50,
                    "times_floor": p50 / floor, "peer_over_lintra": p50 / own, "peak_mib": peak,
                }  # fmt: skip
                rows.append(row | where)
                print(
                    f"{case:14} {direction:9} {name:9} p50 {p50:9.1f} us ({p20:.1f}-{p80:.1f})"
                    f"  {p50 / floor:5.2f} x floor  {p50 / own:5.2f} x lintra  {peak:7.0f} MiB",
                    flush=True,
                )
    return rows


def _plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row["case"], row["direction"]) for row in rows))
    names = list(dict.fromkeys(row["impl"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(2 + 0.8 * len(groups), 5))
    for place, name in enumerate(names):
        heights = {(r["case"], r["direction"]): r["times_floor"] for r in rows if r["impl"] == name}
        positions = [i + place * 0.8 / len(names) for i, group in enumerate(groups)]
        axes.bar(positions, [heights.get(g, 0) for g in groups], 0.8 / len(names), label=name)
    axes.set_xticks(range(len(groups)), [" ".join(g) for g in groups], rotation=60, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel("time / floor")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    import torch

    from lintra.tools.bench_registry import OPERATIONS, first_error

    if options.operation == "list":
        print("\n".join(f"{name}: {' '.join(o.cases)}" for name, o in OPERATIONS.items()))
        return 0
    if options.operation not in OPERATIONS:
        parser.error(f"operation must be one of {', '.join(OPERATIONS)}, got {options.operation!r}")
    operation = OPERATIONS[options.operation]
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    names = options.cases or list(operation.cases)[: None if options.device == "cuda" else 1]
    if unknown := [name for name in names if name not in operation.cases]:
        parser.error(f"cases must be among {', '.join(operation.cases)}, got {unknown[0]!r}")
    wrong = first_error(operation, options.device, getattr(torch, options.dtype))
    if wrong is not None:
        print(f"{options.operation}: {wrong}; no times of wrong results", file=sys.stderr)
        return 1
    rows = _measure(options, operation, names)
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if options.plot is not None:
        _plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
