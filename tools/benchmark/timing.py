"""Clocks: CUDA events behind a sleeping GPU, perf_counter elsewhere; inputs rotate past the L2."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from .case import Run
from .device import Peak, cache_bytes, synchronize

MIN_CALLS = 20
# A call that is too slow for MIN_CALLS within the limit is still measured this often.
FEWEST_CALLS = 5
# What rotates is this many times the cache, so that nothing read is left from the last round.
_CACHES = 3
_MAX_SETS = 64
_SLEEP_CYCLES_PER_SECOND = 2.0e9
_WARM_SECONDS = 0.25
# A call of more needs no long warm-up, and its start is nothing beside the rest.
SLOW_SECONDS = 1.0
_MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """How long to measure.

    Args:
        calls: timed calls wanted, at least 20 for numbers that are reported.
        seconds: of one measurement; fewer calls, at least 5, where they would take longer.
        warmup: calls before, and as many more as a quarter of a second takes: the first calls of a
            process find the host at another pace.
    """

    calls: int = MIN_CALLS
    seconds: float = 3.0
    warmup: int = 3


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call at three quantiles, the number of calls, and peak memory.

    `peak_mib` is what the calls allocate beyond the inputs; 0 where nobody counts (CPU).
    """

    p20: float
    p50: float
    p80: float
    calls: int
    peak_mib: float


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    points = torch.quantile(
        torch.tensor(samples, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double()
    )
    p20, p50, p80 = points.tolist()
    return p20, p50, p80


class Clock:
    """Times single calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._samples: list[float] = []

    def time(self, call: Callable[[], object], host_seconds: float) -> None:
        """Runs and times `call`, which takes the host `host_seconds` to launch; 0 counts them."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            self._samples.append((time.perf_counter() - start) * 1e3)
            return
        if host_seconds > 0:
            # While the GPU sleeps the host queues the whole call: launches are no GPU time.
            seconds = min(2 * host_seconds + 20e-6, 0.1)
            torch.cuda._sleep(int(seconds * _SLEEP_CYCLES_PER_SECOND))
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        call()
        pair[1].record()
        self._events.append(pair)

    def samples(self) -> list[float]:
        """Milliseconds of all calls so far."""
        synchronize(self.device)
        return [*self._samples, *(start.elapsed_time(end) for start, end in self._events)]


def warm_up(
    call: Callable[[], object], device: torch.device, least: int = 1
) -> tuple[float, float]:
    """Calls at least so often, and on a GPU for a quarter of a second; a slow call once.

    Returns:
        Seconds that the last call took in all, and that the host took to launch it.
    """
    whole = host = 0.0
    warm, count = time.perf_counter() + _WARM_SECONDS, 0
    while count < max(1, least) or (device.type == "cuda" and time.perf_counter() < warm):
        count += 1
        synchronize(device)
        start = time.perf_counter()
        call()
        launched = time.perf_counter()
        synchronize(device)
        whole, host = time.perf_counter() - start, launched - start
        if whole > SLOW_SECONDS:
            break
    return whole, host


def times_of(clock: Clock, peak_bytes: int) -> Times:
    samples = clock.samples()
    return Times(*quantiles(samples), len(samples), peak_bytes / _MIB)


def num_calls(limits: Limits, seconds_a_call: float) -> int:
    affordable = int(limits.seconds / max(seconds_a_call, 1e-9))
    return max(min(limits.calls, affordable), min(limits.calls, FEWEST_CALLS))


def _random_like(out: Any) -> Any:
    """For a tensor, or for each of several that an operation gives."""
    return tuple(map(torch.randn_like, out)) if isinstance(out, tuple) else torch.randn_like(out)


def measure(
    run: Run,
    direction: str,
    sets: Sequence[list[Tensor]],
    device: torch.device,
    limits: Limits,
) -> Times:
    """Times `run` by itself in one direction, over sets of inputs that take turns.

    Args:
        run: called with a set.
        direction: ``fwd``, ``bwd`` or ``fwd+bwd``.
        sets: inputs, see `num_sets`.
        device: of the inputs.
        limits: how often.

    ``bwd`` has the forwards of a round of sets behind it, off the clock, before its first backward
    starts: none finds what its forward left in the cache.
    """
    weights: list[Any] = []
    if "bwd" in direction:
        with torch.no_grad():
            weights = [_random_like(run(*inputs)) for inputs in sets]
    indices = range(len(sets))

    def backward(index: int, out: Any) -> object:
        leaves = [x for x in sets[index] if x.requires_grad]
        return torch.autograd.grad(out, leaves, weights[index])

    def forward(index: int) -> object:
        with torch.no_grad():
            return run(*sets[index])

    def both(index: int) -> object:
        return backward(index, run(*sets[index]))

    clock = Clock(device)
    single = forward if direction == "fwd" else both
    single(0)  # compiles
    seconds, host = warm_up(lambda: single(0), device, limits.warmup)
    calls = num_calls(limits, seconds)
    peak = Peak(device)
    if direction == "bwd":
        # The peak of one forward and backward; the rounds below hold several graphs at once.
        both(0)
        peak_bytes = peak.bytes()
        for start in range(0, calls, len(sets)):
            outs = [run(*sets[index]) for index in indices[: calls - start]]
            for index in range(len(outs)):
                out = outs[index]
                outs[index] = None  # type: ignore[call-overload]
                clock.time(lambda i=index, o=out: backward(i, o), host)  # type: ignore[misc]
    else:
        for _, index in zip(range(calls), cycle(indices), strict=False):
            clock.time(lambda i=index: single(i), host)  # type: ignore[misc]
        peak_bytes = peak.bytes()
    return times_of(clock, peak_bytes)


def num_sets(inputs: Sequence[Tensor], device: torch.device) -> int:
    """Sets of inputs whose turns are longer than the cache remembers."""
    size = sum(x.numel() * x.element_size() for x in inputs)
    return min(max(2, -(-_CACHES * cache_bytes(device) // max(size, 1))), _MAX_SETS)


def copy_bandwidth(device: torch.device, limits: Limits) -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    target.copy_(source)
    _, host = warm_up(lambda: target.copy_(source), device, limits.warmup)
    for _ in range(limits.calls):
        clock.time(lambda: target.copy_(source), host)
    return 2 * size / (quantiles(clock.samples())[1] * 1e-3)
