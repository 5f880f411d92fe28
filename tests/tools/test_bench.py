"""The benchmark tool on the CPU: what it prints, writes and refuses, at tiny shapes."""

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lintra import kernels
from lintra.tools import bench
from lintra.tools.benchmark import (
    ada_layer_norm,
    clear,
    lit,
    lit_pixart,
    local_attention,
    models,
    report,
    runner,
    timing,
)
from lintra.tools.benchmark.accuracy import check
from lintra.tools.benchmark.case import OURS, Case, Peer, eager
from lintra.tools.benchmark.local_attention import visible_pairs

QUICK = ["--device", "cpu", "--no-compile", "--calls", "2", "--quiet"]
CPU = torch.device("cpu")


def records(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(name: str, folder: Path, *words: str) -> int:
    return bench.main([name, *QUICK, "--output-dir", str(folder), *words])


@pytest.mark.parametrize("name", bench.OPERATIONS)
def test_an_operation(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, tmp_path, "--markdown", str(tmp_path / "table.md")) == 0
    out = capsys.readouterr().out
    assert "copy bandwidth" in out
    assert "targets: 0 met, 0 missed" in out

    found = records(tmp_path / f"{name}.csv")
    assert tuple(found[0]) == report.CSV_COLUMNS
    ours = [row for row in found if row["impl"] == OURS]
    # Its kernel has no gradient.
    directions = {"fwd"} if name == "stacked_linear" else {"fwd", "bwd", "fwd+bwd"}
    assert {row["direction"] for row in ours} == directions
    for row in ours:
        assert row["op"] == name
        assert row["dtype"] == "bfloat16"
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert float(row["floor_ms"]) > 0
        assert row["torch"] == torch.__version__
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert f"`lintra bench {name} --device cpu" in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1


@pytest.mark.parametrize("name", [*bench.MODEL_NAMES, "lit_pixart"])
@pytest.mark.parametrize("training", [False, True])
def test_a_model(name: str, training: bool, tmp_path: Path) -> None:
    assert run(name, tmp_path, *(["--training"] if training else [])) == 0
    found = records(tmp_path / f"{name}.csv")
    peers = {"lit": "dit", "lit_pixart": "pixart"}
    assert {row["impl"] for row in found} == {OURS, peers.get(name, "timm")}
    assert {row["direction"] for row in found} == {"step" if training else "fwd"}
    assert all(float(row["p50"]) > 0 for row in found)
    assert all(float(row["images_per_second"]) > 0 for row in found)


def test_every_size_of_lit_at_every_resolution() -> None:
    mode = models.Mode(CPU, torch.bfloat16, compile_mode=None)
    found = {str(case): case for case in lit.cases(mode)}
    assert len(found) == 16
    assert found["lit XL 2048px B1 eager"].targets == {("fwd", "dit"): 4.0}
    assert not found["lit S 256px B32 eager"].targets
    assert [check.shape for check in found["lit XL 512px B8 eager"].checks] == [
        "2x1024x4x288",
        "2x32x32x1152 5x5 residual",
        "2x1024x1152",
        "2x1024x1152 gated",
        "2x1024x1152 sum",
    ]
    training = lit.cases(replace(mode, training=True), [(512, 4)])
    assert str(training[0]) == "lit S 512px B4 eager"
    assert {str(target) for case in training for target in case.targets} == {
        "('step', 'memory of dit')"
    }


def test_pixart_at_every_resolution() -> None:
    mode = models.Mode(CPU, torch.bfloat16, "reduce-overhead")
    sides = "512px B8", "1024px B4", "2048px B1"
    found = [f"lit_pixart Sigma {side} compile:reduce-overhead whole" for side in sides]
    assert [str(case) for case in lit_pixart.cases(mode)] == found
    assert lit_pixart.cases(mode)[1].checks[0].shape == "2x4096x4x288"


def test_a_memory_target() -> None:
    case = small_case(targets={("step", "memory of x"): 1.0}, directions=("step",), images=4)

    def row(impl: str, mib: float) -> runner.Row:
        return runner.Row(case, impl, "step", timing.Times(2.0, 2.0, 2.0, 20, mib), floor_ms=0.0)

    (line,) = report.lines_of([row(OURS, 90.0), row("x", 100.0)])
    assert list(map(str, line.verdicts())) == ["<= 1x memory of x: 0.90 met"]
    header, cells = report.table([row(OURS, 90.0), row("x", 100.0)])
    assert dict(zip(header, cells, strict=True))["images/s"] == "2000.0"
    assert dict(zip(header, cells, strict=True))["x"] == "2.000 (1.00x, 100 MiB)"
    (line,) = report.lines_of([row(OURS, 110.0), row("x", 100.0)])
    assert str(line.verdicts()[0]) == "<= 1x memory of x: 1.10 MISSED"
    (line,) = report.lines_of([row(OURS, 0.0)])
    assert str(line.verdicts()[0]) == "<= 1x memory of x: not measured"


def test_a_step_of_flux(tmp_path: Path) -> None:
    assert run("clear", tmp_path) == 0
    found = {(row["shape"], row["impl"]): row for row in records(tmp_path / "clear.csv")}
    assert set(found) == {
        (shape, impl) for shape in ("64px r2", "96px r3") for impl in (OURS, "flex", "sdpa")
    }
    for (_, impl), row in found.items():
        if impl == "flex":
            assert row["error"] == "skipped: --no-compile"
        else:
            assert float(row["p50"]) > 0
        assert row["direction"] == "fwd"


def test_its_peers_have_the_same_weights_and_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes 20 s, and the mask is what can be wrong.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    mask = local_attention.create_block_mask
    monkeypatch.setattr(
        local_attention,
        "create_block_mask",
        lambda *words, **options: mask(*words, **{**options, "_compile": False}),
    )
    mode = models.Mode(CPU, torch.float32, tiny=True)
    case = clear.cases(mode, [(80, 2)])[0]
    inputs = case.make(CPU, torch.float32)
    ours = case.ours.prepare()(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(case.peers["flex"].prepare()(*inputs), ours)
    dense = case.peers["sdpa"].prepare()(*inputs)
    assert (dense - ours).abs().max() > 1e-3
    torch.testing.assert_close(clear.cases(mode, [(80, 9)])[0].ours.prepare()(*inputs), dense)


def test_its_sizes_and_targets() -> None:
    cases = clear.cases(models.Mode(CPU, torch.float32))
    assert [case.shape for case in cases][:3] == ["1024px r8", "1024px r16", "2048px r8"]
    assert ["sdpa" in case.peers for case in cases] == [True, False] * 3 + [False] * 2
    assert [bool(case.targets) for case in cases] == [True, False] * 4


@pytest.mark.parametrize("kind", range(len(ada_layer_norm.KINDS)))
def test_the_floor_of_a_norm_is_what_goes_in_and_out(kind: int) -> None:
    case = ada_layer_norm.build((2, 5, 24, kind))
    inputs = case.make(CPU, torch.bfloat16)
    results = case.ours.prepare()(*inputs)
    moved = (*inputs, *(results if isinstance(results, tuple) else (results,)))
    assert case.floor_bytes is not None
    assert case.floor_bytes(2) == sum(x.numel() * x.element_size() for x in moved)


def test_a_shape_and_a_direction_of_ones_own(tmp_path: Path) -> None:
    words = ["--shape", "1,9,2,8", "--direction", "bwd", "--dtype", "float32"]
    assert run("linear_attention", tmp_path, *words) == 0
    found = records(tmp_path / "linear_attention.csv")
    assert {row["shape"] for row in found} == {"1x9x2x8"}
    assert {row["direction"] for row in found} == {"bwd"}
    assert {row["dtype"] for row in found} == {"float32"}


def wrong_output(*inputs: Tensor, impl: str, **options: object) -> Tensor:
    out = RIGHT(*inputs, impl=impl, **options)
    return out if impl == "reference" else out * 1.1


def wrong_gradient(query: Tensor, *inputs: Tensor, impl: str, **options: object) -> Tensor:
    if impl != "reference":
        query = query.detach() + 1.1 * (query - query.detach())
    return RIGHT(query, *inputs, impl=impl, **options)


def nan_at_the_end(*inputs: Tensor, impl: str, **options: object) -> Tensor:
    out = RIGHT(*inputs, impl=impl, **options)
    if impl != "reference":
        out = out.clone()
        out[-1, -1, -1, -1] = float("nan")
    return out


def crash(*inputs: Tensor, impl: str, **options: object) -> Tensor:
    raise RuntimeError("no such kernel")


RIGHT = kernels.linear_attention


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (wrong_output, "output must be within"),
        (wrong_gradient, "gradient 0 must be within"),
        (nan_at_the_end, "output must be within .* got an error of nan"),
        (crash, "RuntimeError: no such kernel"),
    ],
)
@pytest.mark.parametrize("name", ["linear_attention", "slab_deit"])
def test_a_wrong_implementation_has_no_speed(
    name: str,
    replacement: object,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kernels, "linear_attention", replacement)
    monkeypatch.setattr(timing.Clock, "time", lambda *_: pytest.fail("timed"))
    assert run(name, tmp_path) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: wrong result, so no speed: ")
    assert re.search(message, line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupt_leaves_what_was_measured(
    after: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure, calls = runner.measure, []

    def stopped(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(runner, "measure", stopped)
    if not after:  # as any program
        with pytest.raises(KeyboardInterrupt):
            run("ada_layer_norm", tmp_path)
        assert list(tmp_path.iterdir()) == []
        return
    assert run("ada_layer_norm", tmp_path, "--markdown", str(tmp_path / "table.md")) == 130
    assert len(records(tmp_path / "ada_layer_norm.csv")) == after
    assert "| fwd |" in (tmp_path / "table.md").read_text()
    assert capsys.readouterr().err.endswith("had been measured\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["linear_atention"], "`name` must be one of linear_attention, .*, got 'linear_atention'"),
        (["lit", "--device", "abacus"], "`device` must be one of this machine, got 'abacus'"),
        (["linear_attention", "--calls", "0"], "`calls` must be positive, got 0"),
        (["linear_attention", "--only", "xx"], "`only` must be part of one of .*, got 'xx'"),
        (["linear_attention", "--shape", "1,2"], r"`shape` must be B,N,H,D, .* got \(1, 2\)"),
        (["token_conv2d", "--shape", "1,2"], r"`shape` must be B,h,w,C,k.* got \(1, 2\)"),
        (["local_attention", "--shape", "0,1"], r"`shape` must be side,radius.* got \(0, 1\)"),
        (["ada_layer_norm", "--shape", "1,2"], r"`shape` must be B,N,C.* got \(1, 2\)"),
        (["ada_layer_norm", "--shape", "1,2,3,3"], r"`shape` must be .*, gated 0, 1 or 2, got .*"),
        (["rotary_rms_norm", "--shape", "1,2"], r"`shape` must be B,N,H,D, .* got \(1, 2\)"),
        (["stacked_linear", "--shape", "1,2"], r"`shape` must be G,B,K,F, .* got \(1, 2\)"),
        (["lit", "--shape", "30,1"], r"`shape` must be pixels .* got \(30, 1\)"),
        (["lit_pixart", "--shape", "8,1"], r"`shape` must be pixels .* got \(8, 1\)"),
        (["clear", "--shape", "40,8"], r"`shape` must be pixels,radius, pixels a .* got \(40, 8\)"),
        (["clear", "--training"], "`training` must not be set for clear, .*"),
        (["lit", "--direction", "bwd"], "`direction` must be one of fwd, got bwd"),
    ],
)
def test_a_bad_request_is_one_clear_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if "--device" in words else ["--device", "cpu"]
    assert bench.main([*words, *device, "--output-dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"error: {message}", line)


def fail() -> None:
    raise torch.cuda.OutOfMemoryError("2 EiB wanted")


def small_case(**options: object) -> Case:
    def double(x: Tensor) -> Tensor:
        return x * 2

    return Case(
        op="double",
        group="small",
        shape="4",
        make=lambda device, dtype: [torch.ones(4, device=device, dtype=dtype).requires_grad_()],
        ours=eager(double),
        reference=double,
        floor_bytes=lambda size: 8 * size,
        **options,  # type: ignore[arg-type]
    )


def settings(**options: object) -> runner.Settings:
    limits = timing.Limits(calls=2)
    say = options.pop("say", lambda line: None)
    return runner.Settings(CPU, torch.float32, limits, say=say, **options)  # type: ignore[arg-type]


def test_a_peer_that_fails_does_not_stop_the_run() -> None:
    def unsupported(x: Tensor) -> Tensor:
        raise NotImplementedError("not here\nat all")

    peers = {
        "large": Peer(fail),  # type: ignore[arg-type]
        "odd": eager(unsupported),
        "good": eager(lambda x: x + x),
    }
    _, rows = runner.run_cases([small_case(peers=peers)], settings())
    errors = {row.impl: row.error for row in rows}
    assert errors == {
        OURS: "",
        "large": "out of memory",
        "odd": "NotImplementedError: not here",
        "good": "",
    }
    header, *cells = report.table(rows)
    assert all(row[header.index("large")] == "out of memory" for row in cells)


def test_peers_are_skipped_when_asked_or_late() -> None:
    peers = {"compiled": Peer(fail, is_compiled=True), "plain": eager(lambda x: x + x)}  # type: ignore[arg-type]
    case = small_case(peers=peers)
    _, rows = runner.run_cases([case], settings(use_compile=False, budget=1e-9))
    errors = {row.impl: row.error for row in rows}
    assert errors == {
        OURS: "",
        "compiled": "skipped: --no-compile",
        "plain": "skipped: budget",
    }


def test_peers_can_be_chosen_and_times_are_said_at_once() -> None:
    peers = {"one": eager(lambda x: x + x), "other": eager(lambda x: x + x)}
    said: list[str] = []
    _, rows = runner.run_cases(
        [small_case(peers=peers)], settings(peers=["other"], say=said.append)
    )
    assert {row.impl for row in rows} == {OURS, "other"}
    assert sum(line.startswith("  fwd: ") and line.endswith(" ms") for line in said) == 2


def test_targets() -> None:
    targets = {("fwd", "floor"): 1.5, ("fwd", "peer"): 2.0, ("bwd", "peer"): 2.0, ("bwd", "x"): 1.0}
    case = small_case(targets=targets)

    def row(impl: str, direction: str, milliseconds: float) -> runner.Row:
        times = timing.Times(milliseconds, milliseconds, milliseconds, 20, 0.0)
        return runner.Row(case, impl, direction, times, floor_ms=2.0)

    rows = [row(OURS, "fwd", 3.0), row("peer", "fwd", 5.0)]
    rows += [row(OURS, "bwd", 3.0), row("peer", "bwd", 6.0)]
    forward, backward = report.lines_of(rows)
    assert list(map(str, forward.verdicts())) == [
        "<= 1.5x floor: 1.50 met",
        ">= 2x peer: 1.67 MISSED",
    ]
    assert list(map(str, backward.verdicts())) == [
        ">= 2x peer: 2.00 met",
        ">= 1x x: not measured",
    ]
    assert report.summary(rows) == "targets: 2 met, 1 missed, 1 not measured"


def test_the_check_compares_with_float64() -> None:
    assert check(small_case(), CPU, torch.bfloat16) is None


def test_calls_follow_the_time_allowed() -> None:
    limits = timing.Limits(calls=20, seconds=1.0)
    assert timing.num_calls(limits, 0.01) == 20
    assert timing.num_calls(limits, 0.1) == 10
    assert timing.num_calls(limits, 10.0) == timing.FEWEST_CALLS


@pytest.mark.parametrize("radius", [1, 2, 2.5, 9])
def test_visible_pairs(radius: float) -> None:
    side, prefix, extra = 5, 3, 2
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = y.flatten(), x.flatten()
    disc = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    image = side * side
    expected = disc.sum().item() + image * (prefix + extra) + prefix * (prefix + image)
    assert visible_pairs(side, radius, prefix, extra) == expected
