"""The training loop of the backbones: it learns, resumes to the digit, and says what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from lintra.tools import cli, timm_cli, train_backbone
from lintra.vision import PRepBN, fold_norms
from lintra.vision.training.config import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    NormConfig,
    TrainingConfig,
    parse_recipe,
)
from lintra.vision.training.data import NpzImages, open_images
from lintra.vision.training.loop import BackboneTrainer, TrainingDiverged
from lintra.vision.training.records import read_metrics
from rooms import ROOT
from tiny_backbones import COLOURS, small_recipe, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("images"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


def test_it_learns_and_saves_for_timm(tmp_path: Path, files: dict[str, str]) -> None:
    recipe = small_recipe(
        tmp_path, files, training={"epochs": 6}, ema={"use_ema": True, "decay": 0.5}
    )
    trainer = BackboneTrainer(recipe)
    result = trainer.run()
    assert result.step == 36
    assert result.accuracy > 90
    rows = read_metrics(tmp_path / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    mixes = [row["mix"] for row in rows if "mix" in row]
    assert mixes[0] == pytest.approx(17 / 18)
    assert mixes[18:] == [0] * 18
    assert {"accuracy", "accuracy_ema", "accuracy_recalibrated"} <= {k for row in rows for k in row}
    model = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True).eval()
    images = open_images("npz", files["val"])
    pixels = torch.stack([torch.from_numpy(np.array(images[i][0])) for i in range(13)])
    cfg = model.pretrained_cfg
    x = (pixels / 255 - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])
    labels = torch.from_numpy(images.labels)
    for network in (model, fold_norms(model)):
        hits = network(x.float().permute(0, 3, 1, 2)).argmax(-1) == labels
        assert hits.float().mean() > 0.85


@pytest.mark.parametrize("accumulation", [1, 3])
def test_schedule_and_statistics_advance_once_a_step(
    tmp_path: Path, files: dict[str, str], accumulation: int
) -> None:
    recipe = small_recipe(
        tmp_path,
        files,
        training={"epochs": 1, "gradient_accumulation_steps": accumulation},
        norm={"fraction": 1.0, "recalibration_passes": 0},
        model={"grad_checkpointing": True},
    )
    trainer = BackboneTrainer(recipe)
    trainer.run()
    assert trainer.step == 6 // accumulation
    assert trainer.mixing.mix == 0
    norm = next(m for m in trainer.network.modules() if isinstance(m, PRepBN))
    assert float(norm.mix) == 0
    assert int(norm.repbn.bn.num_batches_tracked) == 6
    assert (1 - norm.repbn.bn.momentum) ** accumulation == pytest.approx(0.9)


@pytest.mark.parametrize("stop_at", [6, 8], ids=["between_epochs", "within_an_epoch"])
def test_resumes_to_the_digit(tmp_path: Path, files: dict[str, str], stop_at: int) -> None:
    options = {
        "data": {
            "mixup": 0.8,
            "cutmix": 1.0,
            "reprob": 0.5,
            "auto_augment": "rand-m9-mstd0.5-inc1",
        },
        "ema": {"use_ema": True, "decay": 0.9},
    }
    whole = small_recipe(tmp_path / "whole", files, **options)
    BackboneTrainer(whole).run()

    parts = small_recipe(tmp_path / "parts", files, **options)
    trainer = BackboneTrainer(parts)
    advance = trainer._advance

    def advance_and_stop() -> None:
        advance()
        if trainer.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._advance = advance_and_stop
    stopped = trainer.run()
    assert stopped.signum == signal.SIGTERM
    assert stopped.step == stop_at
    parts = replace(parts, checkpoint=CheckpointConfig(resume="latest"))
    result = BackboneTrainer(parts).run()
    assert result.step == 18
    expected = weights(tmp_path / "whole")
    for name, value in weights(tmp_path / "parts").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)
    steps = [
        row["step"] for row in read_metrics(tmp_path / "parts" / "metrics.jsonl") if "loss" in row
    ]
    assert steps == list(range(1, 19))


def test_image_folder_and_max_steps(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2)):
        for label, colour in enumerate(COLOURS):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20, 24), tuple(map(int, colour))).save(folder / f"{index}.png")
    paths = {"train": str(tmp_path / "train"), "val": str(tmp_path / "val")}
    recipe = small_recipe(
        tmp_path / "out", paths, training={"max_steps": 3}, data={"source": "imagefolder"}
    )
    result = BackboneTrainer(recipe).run()
    assert result.step == 3
    model = timm.create_model(f"local-dir:{tmp_path / 'out' / 'last'}", pretrained=True)
    assert model.num_classes == 3


def test_packed_npz(tmp_path: Path) -> None:
    import io

    encoded = []
    for value in (10, 200):
        file = io.BytesIO()
        Image.new("RGB", (5, 4), (value, 0, 0)).save(file, "WEBP", lossless=True)
        encoded.append(file.getvalue())
    np.savez(
        tmp_path / "pack.npz",
        data=np.frombuffer(b"".join(encoded), np.uint8),
        lengths=np.array([len(b) for b in encoded], np.uint32),
        header_id=np.zeros(2, np.uint8),
        headers=np.zeros(0, np.uint8),
        header_lengths=np.zeros(1, np.uint32),
        labels=np.array([1, 0], np.uint16),
        classes=np.array(["a", "b", "c"]),
    )
    images = NpzImages(tmp_path / "pack.npz")
    assert len(images) == 2
    assert images.num_classes == 3
    picture, label = images[1]
    assert picture.size == (5, 4)
    assert picture.getpixel((0, 0))[0] == 200
    assert label == 0


def test_starts_from_a_trained_folder(tmp_path: Path, files: dict[str, str]) -> None:
    first = small_recipe(tmp_path / "first", files, training={"max_steps": 2})
    BackboneTrainer(first).run()
    two = np.load(files["train"])
    np.savez(tmp_path / "two.npz", images=two["images"], labels=two["labels"] % 2)
    args = {**first.model.args, "img_size": 24}
    model = {"pretrained": str(tmp_path / "first" / "last"), "args": args}
    recipe = small_recipe(tmp_path / "second", {**files, "val": None}, model=model)
    recipe = replace(recipe, data=replace(recipe.data, train=str(tmp_path / "two.npz")))
    network = BackboneTrainer(recipe).network
    saved = load_file(tmp_path / "first" / "last" / "model.safetensors")
    torch.testing.assert_close(network.blocks[0].attn.qkv.weight, saved["blocks.0.attn.qkv.weight"])
    assert network.blocks[0].attn.positional_encoding.shape == (1, 36, 16)
    assert network.head.out_features == 2
    recipe = replace(recipe, model=replace(recipe.model, pretrained=str(tmp_path)))
    with pytest.raises(ValueError, match=r"`model.pretrained` must be a folder as `best` of a run"):
        BackboneTrainer(recipe)


def test_strongest_posterize_keeps_a_bit(tmp_path: Path, files: dict[str, str]) -> None:
    data = {"auto_augment": "rand-m10-inc1"}
    trainer = BackboneTrainer(small_recipe(tmp_path, files, data=data))
    steps = trainer.loader.dataset.images.transform.transforms
    ops = [op for step in steps for op in getattr(step, "ops", []) if "Posterize" in op.name]
    assert ops
    for op in ops:
        assert op.level_fn(10, {}) == (1,)
        op.prob = 1.0
        op(Image.new("RGB", (4, 4)))


def test_weight_decay_groups(tmp_path: Path, files: dict[str, str]) -> None:
    for decay_tables in (False, True):
        recipe = small_recipe(tmp_path, files, training={"decay_tables": decay_tables})
        trainer = BackboneTrainer(recipe)
        names = {id(p): n for n, p in trainer.network.named_parameters()}
        free = {names[id(p)] for p in trainer._parameters()[1]["params"]}
        assert "pos_embed" in free
        assert ("blocks.0.attn.positional_encoding" in free) != decay_tables
        assert "blocks.0.norm1.repbn.alpha" in free
        assert "blocks.0.attn.qkv.weight" not in free


def test_divergence_is_reported(tmp_path: Path, files: dict[str, str]) -> None:
    recipe = small_recipe(tmp_path, files, training={"epochs": 1})
    trainer = BackboneTrainer(recipe)
    with torch.no_grad():
        trainer.network.head.bias.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"loss nan at step 1"):
        trainer.run()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"model": {"name": "deit_huge_slab"}}, r"`model.name` must be a model of timm or lintra"),
        ({"model": {"args": {"colour": 1}}}, r"`model.args` must fit deit_tiny_slab_patch16_224"),
        ({"data": {"batch_size": 60}}, r"`data.train` must hold at least one step of 60 images"),
        ({"data": {"train": __file__}}, r"`data.train` and `data.val` must be .npz files"),
        ({"checkpoint": {"resume": "nowhere"}}, r"`checkpoint.resume` must be a checkpoint folder"),
    ],
)
def test_trainer_errors(
    tmp_path: Path, files: dict[str, str], groups: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneTrainer(small_recipe(tmp_path, files, **groups))


def test_damaged_checkpoint_and_empty_folder(tmp_path: Path, files: dict[str, str]) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"step": 4}))
    recipe = small_recipe(tmp_path, files, checkpoint={"resume": "latest"})
    with pytest.raises(ValueError, match=r"`checkpoint.resume` must be a whole checkpoint"):
        BackboneTrainer(recipe)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must be folders with a folder of images a class"):
        open_images("imagefolder", str(tmp_path / "empty"))
    two = np.load(files["val"])
    np.savez(tmp_path / "two.npz", images=two["images"], labels=two["labels"] % 2)
    recipe = small_recipe(tmp_path, {**files, "val": str(tmp_path / "two.npz")})
    with pytest.raises(ValueError, match=r"`data.val` must have the 3 classes .* got 2"):
        BackboneTrainer(recipe)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(train="x", batch_size=0), r"`data.batch_size` must be positive, got 0"),
        (lambda: DataConfig(train="x", batch_size=3), r"`data.batch_size` must be even for mixup"),
        (lambda: DataConfig(train="x", workers=-1), r"`data.workers` must not be negative"),
        (lambda: DataConfig(train="x", scale=(0.5, 0.1)), r"`data.scale` must rise within \(0, 1"),
        (lambda: DataConfig(train="x", reprob=2), r"`data.reprob` must be in \[0, 1\], got 2"),
        (lambda: TrainingConfig(epochs=0), r"`training.epochs` must be positive, got 0"),
        (lambda: TrainingConfig(base_lr=0), r"`training.base_lr` must be positive"),
        (lambda: TrainingConfig(clip_grad=-1), r"`training.clip_grad` must not be negative"),
        (lambda: TrainingConfig(epochs=5), r"`training.warmup_epochs` must be in \[0, epo"),
        (lambda: TrainingConfig(max_steps=0), r"`training.max_steps` must be positive"),
        (lambda: NormConfig(fraction=2), r"`norm.fraction` must be in \[0, 1\], got 2"),
        (lambda: NormConfig(recalibration_passes=-1), r"`norm.recalibration_passes` must not be"),
        (lambda: EMAConfig(decay=1), r"`ema.decay` must be in \(0, 1\), got 1"),
        (lambda: CheckpointConfig(every_epochs=-1), r"`checkpoint.every_epochs` must not be"),
        (lambda: CheckpointConfig(total_limit=0), r"`checkpoint.total_limit` must be positive"),
    ],
)  # fmt: skip
def test_recipe_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs" / "vision").glob("*.yaml")), ids=lambda f: f.stem
)
def test_shipped_recipes_are_valid(file: Path, tmp_path: Path) -> None:
    here = str(tmp_path)
    words = ["--config", str(file), "--data.train", here, "--data.val", here]
    if "pretrained:" in file.read_text():
        words += ["--model.pretrained", here]
    recipe = parse_recipe(words, "test", "")
    model = timm.create_model(recipe.model.name, device="meta", num_classes=10, **recipe.model.args)
    assert sum(p.numel() for p in model.parameters()) > 0


def test_command_line(
    tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.COMMANDS["train-backbone"][0] == "lintra.tools.train_backbone"
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "model: {name: pvt_tiny_slab, args: {img_size: 32, embed_dims: [8, 8, 8, 8],"
        " depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1], norm: ln}}\n"
        f"data: {{source: npz, train: {files['train']}, batch_size: 8, workers: 0}}\n"
        "training: {epochs: 1, warmup_epochs: 0, mixed_precision: 'no', max_steps: 2}\n"
    )
    out = str(tmp_path / "out")
    assert train_backbone.main(["--config", str(config), "--output_dir", out]) == 0
    assert "2 steps done; best top-1 not measured; model:" in capsys.readouterr().out
    words = ["--config", str(config), "--output_dir", out, "--model.name", "nothing"]
    assert train_backbone.main(words) == 2
    assert "error: `model.name` must be" in capsys.readouterr().err
    for wrong in (["--training.epoques", "3"], ["--data.train", "nowhere"]):
        with pytest.raises(SystemExit) as stop:
            train_backbone.main(["--config", str(config), "--output_dir", out, *wrong])
        assert stop.value.code == 2


def test_a_signal_leaves_a_checkpoint_and_its_code(tmp_path: Path, files: dict[str, str]) -> None:
    words = [
        sys.executable, "-m", "lintra.tools.train_backbone", "--output_dir", str(tmp_path),
        "--model.name", "pvt_tiny_slab",
        "--model.args", "{img_size: 32, embed_dims: [8, 8, 8, 8], num_heads: [1, 1, 1, 1]}",
        "--data.source", "npz", "--data.train", files["train"], "--data.batch_size", "8",
        "--data.workers", "0", "--training.epochs", "100000", "--logging_steps", "1",
        "--training.mixed_precision", "no", "--checkpoint.every_epochs", "0",
    ]  # fmt: skip
    run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path / "metrics.jsonl") and time.monotonic() < deadline:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    assert "--checkpoint.resume" in error
    assert list(tmp_path.glob("checkpoint-*"))


def test_two_processes_train_through_all_phases(tmp_path: Path, files: dict[str, str]) -> None:
    """DistributedDataParallel fails where a parameter is left out of a step."""
    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "lintra.tools.train_backbone", "--output_dir", str(tmp_path),
        "--model.name", "deit_tiny_slab_patch16_224", "--model.args",
        "{img_size: 16, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}",
        "--data.source", "npz", "--data.train", files["train"], "--data.val", files["val"],
        "--data.batch_size", "4", "--data.workers", "0", "--training.epochs", "2",
        "--training.warmup_epochs", "0", "--training.base_size", "8", "--norm.fraction", "0.5",
        "--training.base_lr", "0.01", "--training.mixed_precision", "no", "--logging_steps", "1",
        "--norm.recalibration_passes", "1", "--checkpoint.every_epochs", "0",
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["mix"] for row in rows if "mix" in row][-1] == 0
    # 13 images on two processes: each counted once.
    shares = [row["accuracy"] * 13 / 100 for row in rows if "accuracy" in row]
    assert all(share == pytest.approx(round(share)) for share in shares)


def test_timm_scripts_see_our_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "validate.py"
    script.write_text(
        "import sys, timm, neighbour\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], timm.is_model('pvt_tiny_slab'), neighbour.x)\n"
    )
    (tmp_path / "neighbour.py").write_text("x = 7\n")
    assert timm_cli.main([str(script), "--model", "pvt_tiny_slab"]) == 0
    assert capsys.readouterr().out.strip() == "['--model', 'pvt_tiny_slab'] True 7"
    assert timm_cli.main([]) == 2
    assert timm_cli.main(["none.py"]) == 2
    assert "must be the path of a timm script, got 'none.py'" in capsys.readouterr().err


def test_it_learns_from_images_on_the_device_and_resumes(
    tmp_path: Path, files: dict[str, str]
) -> None:
    whole = small_recipe(tmp_path / "whole", files, data={"on_device": True})
    result = BackboneTrainer(whole).run()
    assert result.accuracy > 90
    part = replace(whole, output_dir=str(tmp_path / "part"))
    trainer = BackboneTrainer(part)
    advance = trainer._advance

    def stop_inside_an_epoch() -> None:
        advance()
        if trainer.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._advance = stop_inside_an_epoch
    assert trainer.run().signum == signal.SIGTERM
    BackboneTrainer(replace(part, checkpoint=CheckpointConfig(resume="latest"))).run()
    ours, theirs = weights(tmp_path / "part"), weights(tmp_path / "whole")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
