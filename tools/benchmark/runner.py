"""Runs cases: check, then every implementation in every direction, as rows for the report."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .accuracy import check
from .case import ATTENTION_FACTOR, FLOOR_FACTOR, OURS, PEAK_FLOPS, Case, Peer, Run
from .device import freeze, release, short
from .timing import Limits, Times, copy_bandwidth, measure, num_sets
from .turns import time_in_turns


@dataclass(frozen=True)
class Row:
    """One implementation of one case in one direction.

    Args:
        case: what was run.
        impl: OURS or the name of a peer.
        direction: a key of FLOOR_FACTOR.
        times: None where it failed.
        floor_ms: bytes that must move at the measured copy bandwidth; 0: not known.
        error: why there are no times.
    """

    case: Case
    impl: str
    direction: str
    times: Times | None
    floor_ms: float
    error: str = ""


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Args:
        device: where.
        dtype: of the inputs.
        limits: of each measurement.
        use_compile: run peers that need torch.compile.
        budget: seconds of timing, all checks behind, after which no further peer starts.
        directions: those wanted; empty for all of a case.
        peers: those wanted; empty for all of a case.
        say: takes lines about progress.
    """

    device: torch.device
    dtype: torch.dtype
    limits: Limits = field(default_factory=Limits)
    use_compile: bool = True
    budget: float = float("inf")
    directions: Sequence[str] = ()
    peers: Sequence[str] = ()
    say: Callable[[str], None] = print


class CheckFailed(Exception):
    """Our implementation is wrong: there is no speed to report."""


class Interrupted(Exception):
    """Someone has stopped the run; `bandwidth` and `rows` are what it had measured until then."""

    def __init__(self, bandwidth: float, rows: list[Row]) -> None:
        super().__init__("interrupted")
        self.bandwidth, self.rows = bandwidth, rows


def run_cases(cases: Sequence[Case], settings: Settings) -> tuple[float, list[Row]]:
    """Checks all cases, then times them.

    Returns:
        The copy bandwidth in bytes a second, and the rows.

    Raises:
        CheckFailed: before anything is timed.
        Interrupted: by the keyboard, or SIGINT, once something was.
    """
    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)
    freeze()
    for case in cases:
        problem = _checked(case, settings)
        if problem is not None:
            raise CheckFailed(f"{case}: {problem}")
        settings.say(f"correct: {case}")
    bandwidth = copy_bandwidth(settings.device, settings.limits)
    rows: list[Row] = []
    interrupted = False
    try:
        for row in _rows(cases, settings, bandwidth):
            rows.append(row)
    except KeyboardInterrupt:
        if not rows:
            raise
        interrupted = True
    order = {id(case): index for index, case in enumerate(cases)}
    rows.sort(key=lambda row: order[id(row.case)])
    if interrupted:
        raise Interrupted(bandwidth, rows)
    return bandwidth, rows


def _rows(cases: Sequence[Case], settings: Settings, bandwidth: float) -> Iterator[Row]:
    """In the order in which they are measured."""
    started = time.monotonic()

    def skipped(name: str, peer: Peer) -> str:
        if peer.is_compiled and not settings.use_compile:
            return "skipped: --no-compile"
        late = time.monotonic() - started > settings.budget
        return "skipped: budget" if late and name != OURS else ""

    # What compiles is slow to start, so it comes last: a spent budget costs no other row. A case
    # whose implementations take turns is not split, and comes last if one of them compiles.
    for is_compiled in (False, True):
        for case in cases:
            wanted = {n: p for n, p in case.peers.items() if n in (settings.peers or case.peers)}
            entries = {OURS: case.ours, **wanted}
            if case.takes_turns:
                compiles = settings.use_compile and any(p.is_compiled for p in entries.values())
                if compiles == is_compiled:
                    yield from _in_turns(case, entries, settings, bandwidth, skipped)
                continue
            for name, peer in entries.items():
                if peer.is_compiled != is_compiled:
                    continue
                if reason := skipped(name, peer):
                    yield from _failed(case, name, settings, bandwidth, reason)
                    continue
                settings.say(f"timing: {case}: {name}")
                yield from _timed(case, name, peer, settings, bandwidth)


def _checked(case: Case, settings: Settings) -> str | None:
    try:
        return check(case, settings.device, settings.dtype)
    except Exception as error:  # whatever our code raises here is a wrong result
        return short(error)
    finally:
        release(settings.device)


def _peak_flops(settings: Settings) -> float:
    """Of half-precision products on the tensor cores; infinite where it is not known."""
    if settings.device.type != "cuda" or settings.dtype.itemsize != 2:
        return float("inf")
    name = torch.cuda.get_device_name(settings.device)
    return next((peak for word, peak in PEAK_FLOPS.items() if word in name), float("inf"))


def _floor_ms(case: Case, direction: str, settings: Settings, bandwidth: float) -> float:
    if case.floor_bytes is None:
        return 0.0
    floor = FLOOR_FACTOR[direction] * case.floor_bytes(settings.dtype.itemsize) / bandwidth * 1e3
    if case.is_attention:
        flops = ATTENTION_FACTOR[direction] * case.flops
        floor = max(floor, flops / _peak_flops(settings) * 1e3)
    return floor


def _directions(case: Case, settings: Settings) -> list[str]:
    wanted = settings.directions or case.directions
    return [direction for direction in case.directions if direction in wanted]


def _failed(
    case: Case, name: str, settings: Settings, bandwidth: float, error: str
) -> Iterator[Row]:
    for direction in _directions(case, settings):
        floor = _floor_ms(case, direction, settings, bandwidth)
        yield Row(case, name, direction, None, floor, error)


def _sets(case: Case, settings: Settings) -> list[list[Tensor]]:
    torch.manual_seed(0)
    first = case.make(settings.device, settings.dtype)
    more = num_sets(first, settings.device) - 1
    return [first, *(case.make(settings.device, settings.dtype) for _ in range(more))]


def _timed(
    case: Case, name: str, peer: Peer, settings: Settings, bandwidth: float
) -> Iterator[Row]:
    if peer.is_compiled:
        # Without it the eighth shape of a process meets the recompile limit and runs eagerly.
        torch._dynamo.reset()
    try:
        run = peer.prepare()
    except Exception as error:  # a peer that fails is a result, and so is ours
        release(settings.device)
        yield from _failed(case, name, settings, bandwidth, short(error))
        return
    for direction in _directions(case, settings):
        floor = _floor_ms(case, direction, settings, bandwidth)
        try:
            sets = _sets(case, settings)
            times = measure(run, direction, sets, settings.device, settings.limits)
            row = Row(case, name, direction, times, floor)
        except Exception as error:
            row = Row(case, name, direction, None, floor, short(error))
        sets = []
        release(settings.device)
        # At once, so that a run cut short has said what it found.
        settings.say(f"  {direction}: {row.error or f'{times.p50:.4f} ms'}")
        yield row
    del run
    release(settings.device)


def _in_turns(
    case: Case,
    entries: Mapping[str, Peer],
    settings: Settings,
    bandwidth: float,
    skipped: Callable[[str, Peer], str],
) -> Iterator[Row]:
    def prepare(name: str) -> Run:
        settings.say(f"timing: {case}: {name}")
        return entries[name].prepare()

    # As among cases, what compiles comes last.
    ordered = sorted(entries, key=lambda name: entries[name].is_compiled)
    for direction in _directions(case, settings):
        results: dict[str, Times | str]
        try:
            sets = _sets(case, settings)
            results = time_in_turns(
                {name: partial(prepare, name) for name in ordered},
                direction,
                sets,
                settings.device,
                settings.limits,
                skipped=lambda name: skipped(name, entries[name]),
                say=settings.say,
            )
        except Exception as error:  # of the inputs
            results = dict.fromkeys(ordered, short(error))
        sets = []
        release(settings.device)
        floor = _floor_ms(case, direction, settings, bandwidth)
        for name, result in results.items():
            if isinstance(result, str):
                row = Row(case, name, direction, None, floor, result)
            else:
                row = Row(case, name, direction, result, floor)
                memory = f", {result.peak_mib:.0f} MiB" if result.peak_mib else ""
                settings.say(f"  {direction}: {name}: {result.p50:.4f} ms{memory}")
            yield row
