"""What a run prints and writes: aligned text, Markdown, CSV, a plot."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .case import ATTENTION_FACTOR, FLOOR_FACTOR, OURS, Case
from .runner import Row

# Of a target: "memory of PEER".
_MEMORY = "memory of "
CSV_COLUMNS = (
    *("op", "impl", "shape", "dtype", "direction", "p20", "p50", "p80", "peak_mb"),
    *("gpu", "torch", "triton", "commit", "date", "group", "calls", "floor_ms", "error"),
    "images_per_second",
)


@dataclass(frozen=True)
class Environment:
    """Where and when the numbers were taken; `command` takes them again."""

    gpu: str
    torch: str
    triton: str
    commit: str
    date: str
    command: str
    dtype: str
    bandwidth: float

    def lines(self) -> list[str]:
        return [
            f"{self.gpu}, {self.dtype}, torch {self.torch}, triton {self.triton},"
            f" commit {self.commit}, {self.date}",
            f"copy bandwidth {self.bandwidth / 1e12:.2f} TB/s; floor = bytes that must move, at it;"
            " for attention at least its visible pairs at the peak of the tensor cores;"
            " times in ms; peer (x) = its p50 over ours; MiB beyond the inputs",
            f"`{self.command}`",
        ]


@dataclass(frozen=True)
class Verdict:
    """One target: what it asks for, what was reached, None where it could not be told."""

    wanted: str
    reached: float | None
    met: bool

    def __str__(self) -> str:
        reached = "not measured" if self.reached is None else f"{self.reached:.2f}"
        return f"{self.wanted}: {reached}" + ("" if self.reached is None else _word(self.met))


def _word(met: bool) -> str:
    return " met" if met else " MISSED"


@dataclass(frozen=True)
class Line:
    """Ours and the peers of one case in one direction."""

    ours: Row
    peers: dict[str, Row]

    @property
    def case(self) -> Case:
        return self.ours.case

    def verdicts(self) -> list[Verdict]:
        found = []
        for (direction, against), bound in self.case.targets.items():
            if direction != self.ours.direction:
                continue
            mine = self.ours.times
            if against == "floor":
                reached = mine.p50 / self.ours.floor_ms if mine else None
                met = reached is not None and reached <= bound
                found.append(Verdict(f"<= {bound:g}x floor", reached, met))
                continue
            if against.startswith(_MEMORY):
                found.append(self._memory_verdict(against, bound))
                continue
            theirs = self.peers[against].times if against in self.peers else None
            reached = theirs.p50 / mine.p50 if mine and theirs else None
            found.append(
                Verdict(
                    f">= {bound:g}x {against}", reached, reached is not None and reached >= bound
                )
            )
        return found

    def _memory_verdict(self, against: str, bound: float) -> Verdict:
        row = self.peers.get(against.removeprefix(_MEMORY))
        mine, theirs = self.ours.times, row.times if row else None
        known = mine is not None and theirs is not None and theirs.peak_mib > 0
        reached = mine.peak_mib / theirs.peak_mib if mine and theirs and known else None
        met = reached is not None and reached <= bound
        return Verdict(f"<= {bound:g}x {against}", reached, met)


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Rows by case and direction, in the order of the cases."""
    groups: dict[tuple[int, str], dict[str, Row]] = {}
    cases: dict[int, int] = {}
    for row in rows:
        cases.setdefault(id(row.case), len(cases))
        groups.setdefault((id(row.case), row.direction), {})[row.impl] = row
    order = list(FLOOR_FACTOR)
    keys = sorted(groups, key=lambda key: (cases[key[0]], order.index(key[1])))
    found = []
    for key in keys:
        group = groups[key]
        ours = group.pop(OURS)
        found.append(Line(ours, group))
    return found


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells, the header first; a column for each peer that some case has."""
    lines = lines_of(rows)
    peers = list(dict.fromkeys(name for line in lines for name in line.peers))
    header = ["shape", "direction", "p20", "p50", "p80", "floor", "% of floor", "TF/s"]
    header += ["images/s", "MiB"]
    return [[*header, *peers, "targets"], *(_cells(line, peers) for line in lines)]


def _cells(line: Line, peers: Sequence[str]) -> list[str]:
    times, floor, case = line.ours.times, line.ours.floor_ms, line.case
    cells = [f"{case.group} {case.shape}", line.ours.direction]
    if times is None:
        cells += [_cut(line.ours.error), *[""] * 7]
    else:
        factor = ATTENTION_FACTOR if case.is_attention else FLOOR_FACTOR
        flops = case.flops * factor[line.ours.direction]
        cells += [_ms(times.p20), _ms(times.p50), _ms(times.p80)]
        cells += [_ms(floor), f"{100 * floor / times.p50:.0f}"] if floor else ["-", "-"]
        cells.append(f"{flops / times.p50 / 1e9:.1f}" if flops else "-")
        cells += [_images_per_second(case, times.p50) or "-", f"{times.peak_mib:.0f}"]
    for name in peers:
        row = line.peers.get(name)
        if row is None:
            cells.append("-")
        elif row.times is None:
            cells.append(_cut(row.error))
        else:
            facts = [f"{row.times.p50 / times.p50:.2f}x"] if times else []
            facts += [f"{row.times.peak_mib:.0f} MiB"] if case.images else []
            ratio = f" ({', '.join(facts)})" if facts else ""
            cells.append(_ms(row.times.p50) + ratio)
    return [*cells, "; ".join(map(str, line.verdicts()))]


def _images_per_second(case: Case, milliseconds: float) -> str:
    return f"{1e3 * case.images / milliseconds:.1f}" if case.images else ""


def _cut(error: str) -> str:
    """Short enough for a table; the CSV has more."""
    return error if len(error) <= 40 else error[:37] + "..."


def _ms(value: float) -> str:
    """To the microsecond; two digits below ten of them."""
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def text(rows: Sequence[Row], environment: Environment) -> str:
    cells = table(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    body = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([*environment.lines(), "", *body, "", summary(rows)])


def summary(rows: Sequence[Row]) -> str:
    verdicts = [verdict for line in lines_of(rows) for verdict in line.verdicts()]
    met = sum(verdict.met for verdict in verdicts)
    unknown = sum(verdict.reached is None for verdict in verdicts)
    missed = len(verdicts) - met - unknown
    return f"targets: {met} met, {missed} missed, {unknown} not measured"


def markdown(name: str, rows: Sequence[Row], environment: Environment) -> str:
    header, *body = table(rows)
    lines = [_pipes(header), _pipes(["---"] * len(header)), *map(_pipes, body)]
    where, how, command = environment.lines()
    return "\n".join([f"## {name}", "", where + ".", how + ".", command, "", *lines, ""])


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_csv(path: Path, rows: Sequence[Row], environment: Environment) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        writer.writerows(_records(rows, environment))


def _records(rows: Sequence[Row], environment: Environment) -> Iterator[dict[str, object]]:
    for row in rows:
        times = row.times
        numbers: dict[str, object] = {}
        if times is not None:
            numbers = {name: f"{getattr(times, name):.6g}" for name in ("p20", "p50", "p80")}
            numbers |= {"peak_mb": f"{times.peak_mib:.1f}", "calls": times.calls}
            numbers["images_per_second"] = _images_per_second(row.case, times.p50)
        yield {
            "op": row.case.op,
            "impl": row.impl,
            "shape": row.case.shape,
            "dtype": environment.dtype,
            "direction": row.direction,
            "gpu": environment.gpu,
            "torch": environment.torch,
            "triton": environment.triton,
            "commit": environment.commit,
            "date": environment.date,
            "group": row.case.group,
            "floor_ms": f"{row.floor_ms:.6g}",
            "error": row.error,
            **numbers,
        }
