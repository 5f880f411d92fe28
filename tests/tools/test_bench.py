"""`lintra bench`: numbers for right results only, rows in a file, help for mistakes."""

import csv

import pytest

from lintra.tools import bench, bench_registry, bench_timing


@pytest.mark.parametrize("name", bench_registry.OPERATIONS)
def test_times_on_a_cpu(name, tmp_path, capsys):
    rows, plot = tmp_path / "rows.csv", tmp_path / "bars.png"
    words = [name, "--device", "cpu", "--peers", "eager", "--repeats", "3"]
    assert bench.main([*words, "--csv", str(rows), "--plot", str(plot)]) == 0
    with rows.open() as file:
        read = list(csv.DictReader(file))
    assert {(r["impl"], r["direction"]) for r in read} == {
        (impl, direction) for impl in ("lintra", "eager") for direction in bench.DIRECTIONS
    }
    assert all(float(r["p20_us"]) <= float(r["p50_us"]) <= float(r["p80_us"]) for r in read)
    assert plot.stat().st_size > 0
    assert "x floor" in capsys.readouterr().out


def test_wrong_results_give_no_times(monkeypatch, capsys):
    operation = bench_registry.OPERATIONS["linear_attention"]
    right = operation.functions

    def wrong(sizes):
        functions = right(sizes)
        return functions | {"lintra": lambda *x: 1.1 * functions["lintra"](*x)}

    monkeypatch.setitem(
        bench_registry.OPERATIONS,
        "linear_attention",
        bench_registry.Operation(**(vars(operation) | {"functions": wrong})),
    )
    assert bench.main(["linear_attention", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "result 0 is off by" in captured.err
    assert "us" not in captured.out


def test_mistakes_are_named(capsys):
    with pytest.raises(SystemExit):
        bench.main(["attention"])
    assert "operation must be one of linear_attention," in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["linear_attention", "--cases", "vgg"])
    assert "cases must be among tiny," in capsys.readouterr().err


def test_lists_what_there_is(capsys):
    assert bench.main(["list"]) == 0
    assert "token_conv2d_5x5: tiny deit_tiny" in capsys.readouterr().out


def test_quantiles():
    assert bench_timing.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (2.0, 3.0, 5.0)
