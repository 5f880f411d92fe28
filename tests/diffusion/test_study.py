"""A study of seconds on digits: recipes of the arms, runs, resuming, report and packing."""

import json
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lintra.diffusion import load_pipeline
from lintra.diffusion.study.config import TEACHER, Arm, Study, check_study
from lintra.diffusion.study.evaluation import Evaluation
from lintra.diffusion.study.pack import pack_study, unpack_study
from lintra.diffusion.study.report import TABLE_FILES, rows_of, write_report
from lintra.diffusion.study.scheduler import progress_of, run_all
from lintra.diffusion.study.worker import (
    forget_copies,
    is_finished,
    is_trained,
    result_file,
    train_and_measure,
)
from lintra.diffusion.training.loop import Trainer
from lintra.diffusion.training.metrics import read_metrics
from tiny_recipes import DISTILLATION
from tiny_study import ARMS, finish_study, make_study


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study whose runs are all finished."""
    study = make_study(tmp_path_factory.mktemp("done"))
    finish_study(study)
    return study


def test_an_arm_is_a_recipe(done: Study) -> None:
    assert done.steps(TEACHER) == [8]
    assert done.steps("hybrid") == [2, 4]
    teacher, scratch = done.recipe(TEACHER), done.recipe("scratch")
    assert teacher.checkpoint.pipeline_steps == [4]
    assert scratch.model.pretrained_teacher_model is None
    assert scratch.model.kind == "lit"
    assert scratch.model.config == teacher.model.config
    hybrid, softmax = done.recipe("hybrid"), done.recipe("softmax")
    assert hybrid.loss == DISTILLATION
    assert hybrid.model.pretrained_teacher_model == str(done.folder(TEACHER) / "pipeline")
    assert hybrid.model.pretrained_donor_model == str(done.folder(TEACHER) / "pipeline-4")
    assert hybrid.training.max_train_steps == 4
    assert hybrid.checkpoint.pipeline_steps == [2]
    assert softmax.model.pretrained_donor_model is None
    assert (softmax.model.kind, softmax.model.inherit) == ("dit", "all")
    longer = replace(done, teacher_steps=16, seed=3, all_runs={"training.learning_rate": 0.5})
    assert longer.recipe(TEACHER).training.learning_rate == 0.5
    assert longer.recipe(TEACHER).seed == 3
    assert not is_trained(longer, TEACHER)
    assert longer.select(["softmax"]).runs == [TEACHER, "softmax"]


def test_what_needs_no_teacher_does_not_wait_for_it(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    check_study(study)
    assert study.needs(TEACHER) == study.needs("scratch") == []
    assert [folder.name for folder in study.needs("hybrid")] == ["pipeline-4", "pipeline"]
    with pytest.raises(ValueError, match="`arms.hybrid` must have its teacher trained before"):
        study.recipe("hybrid")


def test_runs_are_measured_at_every_length(done: Study) -> None:
    assert all(is_finished(done, run) for run in done.runs)
    rows = rows_of(done)
    found = [(row.run, row.step) for row in rows]
    assert found == [(TEACHER, 8), ("scratch", 2), ("hybrid", 2), ("softmax", 2), ("hybrid", 4)]
    for row in rows:
        assert row.cells["Frechet distance"] > 0
        assert 0 <= row.cells["class accuracy"] <= 1
        assert row.cells["images/s eager"] > 0
    first, last = (load_pipeline(done.pipeline("hybrid", step)) for step in (2, 4))
    names = [name for name, p in first.transformer.named_parameters() if p.abs().sum() > 0]
    assert any(
        not torch.equal(first.transformer.get_parameter(n), last.transformer.get_parameter(n))
        for n in names
    )


def test_the_report(done: Study) -> None:
    text = write_report(done, "the command", {"softmax": "why"})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5
    assert len({line.count("|") for line in lines}) == 1
    assert "20 samples each from the same noise" in text
    assert "`the command`" in text
    assert "Failed: softmax." in text
    assert "Not measured yet" not in text
    assert all((Path(done.output_dir) / name).is_file() for name in TABLE_FILES)


def test_progress(done: Study, tmp_path: Path) -> None:
    assert re.fullmatch(r" at step 4 of 4, \d+ images/s", progress_of(done, "hybrid"))
    study = make_study(tmp_path)
    assert progress_of(study, "hybrid") == ""
    study.folder("hybrid").mkdir(parents=True)
    row = {"step": 1, "images_per_second": 2.0}
    file = study.folder("hybrid") / "metrics.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(row)[:9])  # a line in the making
    assert progress_of(study, "hybrid") == " at step 1 of 4, 2 images/s"


def test_nothing_measured_is_no_report(tmp_path: Path) -> None:
    assert write_report(make_study(tmp_path), "", {}) == ""


def test_a_packed_study_goes_on_elsewhere(done: Study, tmp_path: Path) -> None:
    lines: list[str] = []
    parts = pack_study(done, tmp_path / "pack", limit=10**8, say=lines.append)
    assert [part.name for part in parts] == ["state.tar.00"]
    assert not lines
    elsewhere = make_study(tmp_path)
    assert unpack_study(tmp_path / "pack", Path(elsewhere.output_dir))
    assert not unpack_study(tmp_path / "pack", Path(elsewhere.output_dir))
    assert all(is_finished(elsewhere, run) for run in elsewhere.runs)
    assert is_trained(elsewhere, TEACHER)
    teacher = load_pipeline(elsewhere.pipeline(TEACHER, 8), dtype=torch.float32)
    exact = load_pipeline(done.pipeline(TEACHER, 8)).transformer.state_dict()
    for name, tensor in teacher.transformer.state_dict().items():
        assert torch.equal(tensor, exact[name].bfloat16().float())
    assert write_report(elsewhere, "", {}) == write_report(done, "", {})
    # Another arm on the carried teacher.
    arms = {"more": Arm(title="more", lengths=[0.25])}
    assert train_and_measure(replace(elsewhere, arms=arms), "more") is None


def test_a_packed_study_writes_below_its_folder_only(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "state.tar.00", "w") as tar:
        tar.add(Path(__file__), arcname="../outside.py")
    with pytest.raises(ValueError, match=r"`unpack` must hold files below .* got ../outside.py"):
        unpack_study(tmp_path, tmp_path / "inner")
    assert not (tmp_path / "outside.py").exists()


def test_what_has_no_room_is_left_out(done: Study, tmp_path: Path) -> None:
    lines: list[str] = []
    result_file(done, "hybrid", 2).rename(tmp_path / "moved")
    pack_study(done, tmp_path / "pack", limit=1, say=lines.append)
    (tmp_path / "moved").rename(result_file(done, "hybrid", 2))
    assert lines[0] == "pack: no room for teacher at 8"
    assert lines.count("pack: no room for hybrid at 2") == 1
    elsewhere = make_study(tmp_path)
    unpack_study(tmp_path / "pack", Path(elsewhere.output_dir))
    assert not is_trained(elsewhere, TEACHER)
    assert is_finished(elsewhere, TEACHER)
    with pytest.raises(ValueError, match="`unpack` must be a folder with state.tar.00, got"):
        unpack_study(tmp_path / "none", tmp_path / "new")


def test_a_stopped_run_is_packed_and_resumed(tmp_path: Path) -> None:
    study = make_study(tmp_path / "a", teacher_steps=10**6, arms={"scratch": ARMS["scratch"]})
    metrics = study.folder(TEACHER) / "metrics.jsonl"

    def stop_after_three() -> None:
        while len(read_metrics(metrics)) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_three, daemon=True).start()
    assert train_and_measure(study, TEACHER) == signal.SIGTERM
    assert not is_finished(study, TEACHER)
    step = read_metrics(metrics)[-1]["step"]
    pack_study(study, tmp_path / "pack", limit=10**8)
    carried = make_study(tmp_path / "b", teacher_steps=step + 2, arms=study.arms)
    unpack_study(tmp_path / "pack", Path(carried.output_dir))
    assert train_and_measure(carried, TEACHER) is None
    steps = [row["step"] for row in read_metrics(carried.folder(TEACHER) / "metrics.jsonl")]
    assert steps == [*range(1, step + 3)]


def test_a_checkpoint_past_a_step_to_be_measured_is_of_no_use(tmp_path: Path) -> None:
    arms = {"scratch": replace(ARMS["scratch"], lengths=[0.25, 0.5])}
    study = make_study(tmp_path, arms=arms)
    recipe = study.recipe("scratch")
    keep = replace(recipe.checkpoint, checkpointing_steps=3, pipeline_steps=[])
    Trainer(replace(recipe, checkpoint=keep)).run()
    assert (study.folder("scratch") / "checkpoint-3").is_dir()
    shutil.rmtree(study.folder("scratch") / "pipeline")
    assert train_and_measure(study, "scratch") is None
    assert is_finished(study, "scratch")
    rows = read_metrics(study.folder("scratch") / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert not (study.folder("scratch") / "checkpoint-3").exists()


FAKE = """
import signal, sys, time
from pathlib import Path
folder, run, kind, *files = sys.argv[1:]
print("hello from", run, flush=True)
if kind == "crash":
    raise SystemExit("out of luck")
if kind == "endless":
    signal.signal(signal.SIGTERM, lambda *_: (Path(folder, run, "stopped").touch(), sys.exit(143)))
    Path(folder, run, "running").touch()
    time.sleep(100)
Path(folder, run, "pipeline").mkdir(exist_ok=True)
Path(folder, run, "pipeline-4").mkdir(exist_ok=True)
record = '{"training": {"max_train_steps": 8}}'  # the teacher's
Path(folder, run, "pipeline", "recipe.json").write_text(record)
for file in files:
    Path(file).write_text("{}")
"""


def fake(study: Study, kinds: dict[str, str]) -> dict[str, list[str]]:
    """Command of a process that stands for each run: quick, crash or endless."""
    return {
        run: [
            *(sys.executable, "-c", FAKE, study.output_dir, run, kinds.get(run, "quick")),
            *(str(result_file(study, run, step)) for step in study.steps(run)),
        ]
        for run in study.runs
    }


def test_runs_wait_for_their_teacher_and_a_crash_stops_no_other(tmp_path: Path) -> None:
    study, lines = make_study(tmp_path), []
    commands = fake(study, {"hybrid": "crash"})
    outcome = run_all(study, commands.__getitem__, parallel=2, say=lines.append)
    assert outcome.unfinished == ["hybrid"]
    assert outcome.failed["hybrid"].endswith("out of luck")
    events = [line.split(" s: ")[1] for line in lines]
    assert events[:2] == ["teacher started", "scratch started"]
    assert events.index("teacher finished") < events.index("hybrid started")
    assert any("hybrid FAILED, see" in event for event in events)
    again = run_all(study, fake(study, {}).__getitem__, say=lines.append)
    assert (again.unfinished, again.failed) == ([], {})


def test_runs_are_spread_over_the_gpus(tmp_path: Path, monkeypatch) -> None:
    from lintra.diffusion.study import scheduler

    for visible, count, expected in [("", 2, ["0", "1"]), ("3, 5", 2, ["3", "5"]), ("3", 0, [])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert scheduler.visible_gpus() == expected
    arms = dict.fromkeys("abc", ARMS["scratch"])
    study = make_study(tmp_path, arms=arms)
    monkeypatch.setattr(scheduler, "visible_gpus", lambda: ["3", "5"])
    says = "import os, time; time.sleep(1); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    for parallel, expected in [(4, ["3", "5", "3", "5"]), (1, ["3", "3", "3", "3"])]:
        run_all(study, lambda run: [sys.executable, "-c", says], parallel=parallel)
        logs = [(study.folder(run) / "log.txt").read_text().split()[-1] for run in study.runs]
        assert logs == expected


def test_a_teacher_of_fewer_steps_does_not_serve(tmp_path: Path) -> None:
    """Its students wait for the one that is asked for now, and copies of it are forgotten."""
    arms = {**ARMS, "copy": Arm(title="copy", lengths=[0])}
    study, lines = make_study(tmp_path, arms=arms), []
    short = replace(study, teacher_steps=4)
    for run in (TEACHER, "copy"):
        (study.folder(run) / "pipeline").mkdir(parents=True)
    record = {"training": {"max_train_steps": 4}}
    (study.folder(TEACHER) / "pipeline" / "recipe.json").write_text(json.dumps(record))
    result_file(study, "copy", 0).write_text("{}")
    forget_copies(short)
    assert is_finished(study, "copy")
    commands = fake(study, {})
    assert run_all(study, commands.__getitem__, parallel=3, say=lines.append).unfinished == []
    events = [line.split(" s: ")[1] for line in lines]
    assert events[:2] == ["teacher started", "scratch started"]
    assert events.index("teacher finished") < events.index("copy started")


def test_time_that_is_up_stops_all_politely(tmp_path: Path, monkeypatch) -> None:
    from lintra.diffusion.study import scheduler

    monkeypatch.setattr(scheduler, "GRACE", 1.0)
    monkeypatch.setattr(scheduler, "LEAST", 0.5)
    study = make_study(tmp_path)
    commands = fake(study, {TEACHER: "endless", "scratch": "endless"})
    started = time.monotonic()
    outcome = run_all(
        study, commands.__getitem__, parallel=2, stop_after=3.0, say=lambda line: None
    )
    assert time.monotonic() - started < 4
    assert outcome.unfinished == study.runs
    assert outcome.failed == {}
    assert all((study.folder(run) / "stopped").is_file() for run in (TEACHER, "scratch"))
    # Too late to begin anything.
    assert run_all(study, commands.__getitem__, stop_after=1.2).unfinished == study.runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "none.yaml"}, "`teacher` must be an existing recipe, got 'none.yaml'"),
        ({"arms": {}}, "`arms` must name one at least"),
        ({"arms": {"a/b": ARMS["scratch"]}}, "`arms` must have names of letters, digits and _"),
        ({"arms": {TEACHER: ARMS["scratch"]}}, "`arms` must have names of .* not teacher"),
    ],
)
def test_wrong_studies(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_study(tmp_path, **changes)


def test_wrong_fields(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`arms.lengths` must be positive and rising, or only 0"):
        Arm(title="", lengths=[0.4, 0.2])
    with pytest.raises(ValueError, match=r"`arms.donor_length` must be in \(0, 1\], got 2"):
        Arm(title="", lengths=[0.4], donor_length=2)
    with pytest.raises(ValueError, match="`evaluation.scheduler` must be one of ddim, .* got 'x'"):
        Evaluation(scheduler="x")
    with pytest.raises(ValueError, match="`evaluation.num_images` must be greater than 1, got 1"):
        Evaluation(num_images=1)
    with pytest.raises(ValueError, match="`weights` must be given for the space 'squeezenet1_0"):
        Evaluation(space="squeezenet1_0_caffe")
    with pytest.raises(ValueError, match="`only` must name arms of scratch, .* got \\['x'\\]"):
        make_study(tmp_path).select(["x"])
