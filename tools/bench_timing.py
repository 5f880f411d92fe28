"""Timing for `lintra bench`: rotated inputs, CUDA graphs where there is a GPU, quantiles."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

# More than the last-level cache of any GPU: a call must not find what the one before it left.
ROTATED_BYTES = 200_000_000
Call = Callable[[], object]


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    times = sorted(times)
    p20, p50, p80 = (times[round(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
    return p20, p50, p80


def _cuda_times(calls: list[Call], repeats: int) -> list[float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    # One graph over all inputs: the host, slower than small kernels, stays out of the numbers.
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 12 // len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for call in calls * rounds:
            call()
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (len(calls) * rounds))
    return times[2:]


def _cpu_times(calls: list[Call], repeats: int) -> list[float]:
    calls[0]()
    times = []
    for place in range(repeats):
        begin = time.perf_counter()
        calls[place % len(calls)]()
        times.append((time.perf_counter() - begin) * 1e6)
    return times


def time_calls(calls: list[Call], device: str, repeats: int) -> tuple[float, float, float]:
    """p20, p50, p80 of one call in microseconds."""
    return quantiles((_cuda_times if device == "cuda" else _cpu_times)(calls, repeats))


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per microsecond by a large copy, the floor's unit."""
    source = torch.randn(2**28 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)

    def copy() -> object:
        return target.copy_(source)

    times = []
    for _ in range(9):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            copy()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        else:
            times += _cpu_times([copy], 1)
    return 2 * source.numel() * source.element_size() / statistics.median(times[2:])


def calls_of(
    function: Callable[..., Tensor], inputs: list[list[Tensor]], direction: str
) -> list[Call]:
    """One call for each set of inputs: forward, backward alone, or both."""
    if direction == "forward":

        def forward(tensors: list[Tensor]) -> Call:
            def call() -> object:
                with torch.no_grad():
                    return function(*tensors)

            return call

        return [forward(tensors) for tensors in inputs]

    def with_gradients(tensors: list[Tensor]) -> Call:
        leaves = [x.detach().requires_grad_() for x in tensors]
        d_out = torch.randn_like(function(*tensors))
        if direction == "both":
            return lambda: torch.autograd.grad(function(*leaves), leaves, d_out)
        state: dict[str, Tensor] = {}

        def call() -> object:
            # The forward pass belongs to the stream of the first call, where the graph is made.
            if "out" not in state:
                state["out"] = function(*leaves)
            return torch.autograd.grad(state["out"], leaves, d_out, retain_graph=True)

        return call

    return [with_gradients(tensors) for tensors in inputs]
