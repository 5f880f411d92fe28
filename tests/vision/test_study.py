"""A study of backbones: its table, runs at the same time, signals, and wrong words."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lintra.tools import backbone_study
from lintra.vision.norm import RepBN
from lintra.vision.training import study
from lintra.vision.training.config import TrainingConfig
from lintra.vision.training.loop import BackboneTrainer, TrainingDiverged, TrainingResult
from rooms import ROOT
from tiny_backbones import small_recipe, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("images"))


def test_study_writes_its_table(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "--config", str(ROOT / "configs" / "vision" / "imagenette64_deit.yaml"),
        "--seeds", "0", "1", "--arms", "softmax, LayerNorm", "SLA, PRepBN (SLAB)",
        "--table", str(tmp_path / "results" / "table.md"), "--throughput-batch", "2",
        "--throughput-seconds", "0.01",
        "--output_dir", str(tmp_path), "--data.train", files["train"], "--data.val", files["val"],
        "--data.batch_size", "8", "--data.workers", "0", "--training.max_steps", "2",
        "--training.mixed_precision", "no", "--norm.recalibration_passes", "1",
        "--model.args",
        "{img_size: 16, patch_size: 4, embed_dim: 8, depth: 1, num_heads: 1}",
    ]  # fmt: skip
    timed = []

    def note_norms(network: nn.Module, *_: Any, **__: Any) -> float:
        timed.append(any(isinstance(module, RepBN) for module in network.modules()))
        return 1.0

    assert backbone_study.main(words) == 0
    monkeypatch.setattr(study, "images_per_second", note_norms)
    assert backbone_study.main(words) == 0  # nothing is left to train
    assert timed == [False, False, True, False]  # the last one before and after folding
    table = (tmp_path / "results" / "table.md").read_text()
    assert table.count("\n| ") == 3
    assert "| SLA, PRepBN (SLAB) |" in table
    assert "python -m lintra.tools.backbone_study --config" in table
    run = BackboneTrainer.run
    stopped = TrainingResult(1, None, None, tmp_path, signal.SIGTERM)
    monkeypatch.setattr(BackboneTrainer, "run", lambda self: stopped)
    assert backbone_study.main([*words, "--output_dir", str(tmp_path / "stopped")]) == 143

    def diverge(self: BackboneTrainer) -> None:
        self.folder.mkdir(parents=True)
        raise TrainingDiverged("loss nan at step 3")

    monkeypatch.setattr(BackboneTrainer, "run", diverge)
    assert backbone_study.main([*words, "--output_dir", str(tmp_path / "diverged")]) == 0
    table = (tmp_path / "results" / "table.md").read_text()
    assert "| SLA, PRepBN (SLAB) | diverged | diverged (loss nan at step 3), " in table
    new = [*words, "--output_dir", str(tmp_path / "untrained"), "--no-training"]
    assert backbone_study.main(new) == 0
    assert not (tmp_path / "untrained").exists()
    untrained = "| SLA, PRepBN (SLAB) | not trained | not finished, not finished | - | 1 | 1 |"
    assert untrained in (tmp_path / "results" / "table.md").read_text()
    monkeypatch.setattr(BackboneTrainer, "run", run)
    bad = [*words, "--model.name", "nothing", "--output_dir", str(tmp_path / "new")]
    assert backbone_study.main(bad) == 2


def test_study_runs_several_at_once_and_passes_a_signal_on(
    tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(tmp_path, files)
    runs = [replace(recipe, output_dir=str(tmp_path / name)) for name in "ab"]
    study.train_all(runs, jobs=2)
    assert all((tmp_path / name / "last" / "model.safetensors").is_file() for name in "ab")
    study.train_all(runs, jobs=2)
    assert capsys.readouterr().out.count(" %") == 2  # nothing was left for the second call
    longer = replace(recipe, output_dir=str(tmp_path / "c"), training=TrainingConfig(epochs=10**6))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(study.Stopped, match="signal 15"):
        study.train_all([longer], jobs=2)
