"""Models and their peers are timed in turns: who runs when, what fails alone, what compiles."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lintra.tools.benchmark import lit, lit_pixart, models, runner, timing, turns
from lintra.tools.benchmark.case import OURS, Case, Peer, Run, eager
from lintra.tools.benchmark.device import open_device

CPU = torch.device("cpu")
LIMITS = timing.Limits(calls=5)


def case_of(ours: Peer, peers: dict[str, Peer], **options: object) -> Case:
    return Case(
        op="model",
        group="small",
        shape="4",
        make=lambda device, dtype: [torch.randn(4, device=device, dtype=dtype)],
        ours=ours,
        peers=peers,
        directions=("fwd",),
        takes_turns=True,
        **options,  # type: ignore[arg-type]
    )


def rows_of(case: Case, **options: object) -> dict[str, runner.Row]:
    options = {"limits": LIMITS, "say": lambda line: None, **options}
    _, rows = runner.run_cases([case], runner.Settings(CPU, torch.float32, **options))  # type: ignore[arg-type]
    return {row.impl: row for row in rows}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | str]]:
    """Calls of `noted` functions, (name, which input), with ("clock", 0) before each timed one."""
    found: list[tuple[str, int | str]] = []
    plain = timing.Clock.time

    def noting(clock: timing.Clock, call: Callable[[], object], host_seconds: float) -> None:
        assert host_seconds == 0, "launches count"
        found.append(("clock", 0))
        plain(clock, call, host_seconds)

    monkeypatch.setattr(timing.Clock, "time", noting)
    # The bandwidth has another way to time.
    monkeypatch.setattr(runner, "copy_bandwidth", lambda *_: 1e9)
    return found


def noted(name: str, log: list[tuple[str, int | str]]) -> Peer:
    def run(x: Tensor) -> Tensor:
        log.append((name, x.data_ptr()))
        assert not torch.is_grad_enabled()
        return x + 1

    return eager(run)


def test_calls_alternate_and_inputs_go_on(log: list[tuple[str, int | str]]) -> None:
    rows = rows_of(case_of(noted(OURS, log), {"peer": noted("peer", log)}))
    assert {name: row.times.calls for name, row in rows.items() if row.times} == {
        OURS: 5,
        "peer": 5,
    }
    start = log.index(("clock", 0)) - 2  # the warm-up of the first turn, and its untimed call
    words = [name for name, _ in log[start:]]

    def turn(name: str, calls: int) -> list[str]:
        return [name, *["clock", name] * calls]

    first = [turn(name, 1) for name in (OURS, "peer")]
    later = [turn(name, 2) for name in (OURS, "peer")]
    warm = [[OURS], ["peer"]]
    assert words == sum([warm[0], first[0], warm[1], first[1], *later, *later], start=list[str]())
    # Every call of anyone takes the next input.
    inputs = [which for name, which in log[start:] if name != "clock"]
    assert len(set(inputs)) == 2
    assert all(one != other for one, other in pairwise(inputs))


def test_a_slow_one_has_fewer_calls_in_as_many_turns(
    log: list[tuple[str, int | str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.05, 2.0])
    monkeypatch.setattr(turns, "warm_up", lambda call, *_: (next(seconds, 0.0), 0.0))
    limits = timing.Limits(calls=20, seconds=3.0)
    rows_of(case_of(noted(OURS, log), {"slow": noted("slow", log)}), limits=limits)
    words = [name for name, _ in log[log.index(("clock", 0)) - 1 :]]
    # One call in three of ours is off the clock, none of one that is slow.
    assert words.count("clock") == 20 + timing.FEWEST_CALLS
    assert (words.count(OURS), words.count("slow")) == (20 + 3, timing.FEWEST_CALLS)
    order = [one for one, other in pairwise([w for w in words if w != "clock"]) if one != other]
    assert order == [OURS, "slow", OURS, "slow", OURS]


def test_memory_is_that_of_one_call_by_itself(
    log: list[tuple[str, int | str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Peak:
        def __init__(self, device: torch.device) -> None:
            log.append(("peak", 0))

        def bytes(self) -> int:
            log.append(("bytes", 0))
            return 3 * 2**20

    monkeypatch.setattr(turns, "Peak", Peak)
    rows = rows_of(case_of(noted(OURS, log), {"peer": noted("peer", log)}))
    assert all(row.times and row.times.peak_mib == 3 for row in rows.values())
    words = [name for name, _ in log]
    for name in (OURS, "peer"):
        place = words.index("peak")
        assert words[place : place + 3] == ["peak", name, "bytes"]
        del words[: place + 3]
    assert words.index("clock") > 0


def raising(error: BaseException, after: int) -> Peer:
    """A peer whose call of this number raises."""
    count = 0

    def run(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count > after:
            raise error
        return x

    return eager(run)


def refuse() -> Run:
    raise ImportError("no such package")


def test_one_that_fails_leaves_the_others_their_times() -> None:
    said: list[str] = []
    peers = {
        "absent": Peer(refuse),
        "first": raising(RuntimeError("at once"), 0),
        "later": raising(RuntimeError("in a turn"), 9),
        "good": eager(lambda x: x),
    }
    rows = rows_of(case_of(eager(lambda x: x), peers), say=said.append)
    assert list(rows) == [OURS, *peers]
    assert {name: row.error for name, row in rows.items()} == {
        OURS: "",
        "absent": "ImportError: no such package",
        "first": "RuntimeError: at once",
        "later": "RuntimeError: in a turn",
        "good": "",
    }
    for name in (OURS, "good"):
        times = rows[name].times
        assert times is not None
        assert times.calls == 5
    assert [line for line in said if line.startswith("timing: ")] == [
        f"timing: model small 4: {name}" for name in rows
    ]
    assert [line.split(": ")[1] for line in said if line.endswith(" ms")] == [OURS, "good"]


def test_ours_may_fail_too_or_be_alone() -> None:
    rows = rows_of(case_of(Peer(refuse), {"peer": eager(lambda x: x)}))
    assert rows[OURS].error == "ImportError: no such package"
    assert rows["peer"].times is not None
    alone = rows_of(case_of(eager(lambda x: x), {}))
    assert alone[OURS].times is not None


def test_what_is_not_wanted_is_not_prepared() -> None:
    peers = {
        "compiled": Peer(refuse, is_compiled=True),
        "plain": eager(lambda x: x),
        "other": Peer(refuse),
    }
    case = case_of(eager(lambda x: x), peers)
    wanted = ["plain", "compiled"]
    rows = rows_of(case, use_compile=False, peers=wanted)
    # What compiles comes last.
    assert {name: row.error for name, row in rows.items()} == {
        OURS: "",
        "plain": "",
        "compiled": "skipped: --no-compile",
    }
    assert list(rows) == [OURS, *wanted]
    late = rows_of(case, budget=1e-9)
    assert {row.error for name, row in late.items() if name != OURS} == {"skipped: budget"}
    assert late[OURS].times is not None


def test_an_interrupt_ends_the_run_after_what_was_said() -> None:
    said: list[str] = []
    case = case_of(eager(lambda x: x), {"peer": raising(KeyboardInterrupt(), 0)})
    with pytest.raises(KeyboardInterrupt):
        rows_of(case, say=said.append)
    assert said[-1] == "timing: model small 4: peer"
    assert said[-2].startswith(f"  fwd: {OURS}: ")


def test_one_without_room_beside_the_others_is_timed_after_them() -> None:
    living: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def large() -> Run:
        if living:
            raise torch.cuda.OutOfMemoryError("with another there")
        model = nn.Identity()
        living.add(model)
        return model

    def never() -> Run:
        raise torch.cuda.OutOfMemoryError("nowhere")

    rows = rows_of(case_of(Peer(large), {"large": Peer(large), "never": Peer(never)}))
    assert {name: row.error for name, row in rows.items()} == {
        OURS: "",
        "large": "",
        "never": "out of memory",
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "whole"),
    [("lit", False), ("lit", True), ("lit_pixart", False), ("inline_deit", False)],
)
def test_nothing_compiles_once_turns_begin(
    name: str, whole: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounter()
    build, peer = {
        "lit": (lit.cases, "dit"),
        "lit_pixart": (lit_pixart.cases, "pixart"),
        "inline_deit": (partial(models.cases, [name]), "timm"),
    }[name]
    original, plain = torch.compile, turns.take_turns
    compiled: list[int] = []

    def counting(entrants: Mapping[str, turns.Entrant], *words: Any) -> Any:
        assert list(entrants) == [OURS, peer]
        compiled.append(counter.frame_count)
        found = plain(entrants, *words)
        compiled.append(counter.frame_count)
        return found

    monkeypatch.setattr(
        torch, "compile", lambda model, dynamic, mode: original(model, backend=counter)
    )
    monkeypatch.setattr(turns, "take_turns", counting)
    monkeypatch.setattr(runner, "_checked", lambda *_: None)
    monkeypatch.setattr(runner, "copy_bandwidth", lambda *_: 1e9)
    mode = models.Mode(CPU, torch.bfloat16, tiny=True, training=training, whole=whole)
    settings = runner.Settings(CPU, torch.bfloat16, LIMITS, say=lambda line: None)
    _, rows = runner.run_cases(build(mode, [(64, 2), (96, 2)]), settings)
    assert not any(row.error for row in rows)
    first, after_first, second, after_second = compiled
    assert first >= 2, "both models compile"
    assert after_first == first
    # The code of the first case is gone: the second compiles as much.
    assert second == 2 * first
    assert after_second == second


@pytest.mark.parametrize("compile_mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_of_whole_models(compile_mode: str) -> None:
    mode = models.Mode(CPU, torch.bfloat16, compile_mode, tiny=True)
    assert [str(case) for case in lit.cases(mode)] == [
        f"lit tiny 64px B2 compile:{compile_mode} whole"
    ]
    plain = replace(mode, compile_mode="max-autotune-no-cudagraphs")
    assert not str(*lit.cases(plain)).endswith("whole")


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_graphs_of_two_models_take_turns(training: bool) -> None:
    device = open_device("cuda")
    mode = models.Mode(device, torch.bfloat16, "reduce-overhead", training, tiny=True)
    cases = models.cases(["inline_deit"], mode) + lit.cases(mode)
    settings = runner.Settings(device, torch.bfloat16, LIMITS, say=lambda line: None)
    _, rows = runner.run_cases(cases, settings)
    found = [(row.impl, row.error) for row in rows]
    assert found == [(OURS, ""), ("timm", ""), (OURS, ""), ("dit", "")]
