"""The training loop on real digits: distillation, exact resume, signals, failures."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from lintra.diffusion import assert_linear, load_pipeline, load_transformer
from lintra.diffusion.compilation import compile_blocks
from lintra.diffusion.training import loop
from lintra.diffusion.training.checkpoint import reduce_to_weights
from lintra.diffusion.training.loop import Trainer, TrainingDiverged
from lintra.diffusion.training.metrics import read_metrics
from lintra.diffusion.training.objective import Objective
from tiny_models import tiny_dit, tiny_pipeline, tiny_vae
from tiny_recipes import DISTILLATION, digits_recipe, distillation_recipe


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Pipeline folder of a DiT that was trained for six steps."""
    return Trainer(digits_recipe(tmp_path_factory.mktemp("teacher"))).run().pipeline


def losses(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without what depends on the clock."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    return load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")


def test_distillation_end_to_end(teacher, tmp_path):
    recipe = distillation_recipe(
        tmp_path,
        teacher,
        validation={"num_validation_images": 4, "validation_steps": 3},
        checkpoint={"checkpointing_steps": 2, "checkpoints_total_limit": 2},
        logging={"report_to": "tensorboard"},
    )
    result = Trainer(recipe).run()
    assert (result.step, result.signum, result.checkpoint) == (6, None, None)
    rows = losses(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    expected = {"step", "loss", "gradient_norm", "learning_rate"}
    assert set(rows[0]) == expected | {f"loss_{name}" for name in DISTILLATION}
    total = sum(weight * rows[0][f"loss_{name}"] for name, weight in DISTILLATION.items())
    assert rows[0]["loss"] == pytest.approx(total, rel=1e-5)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert_linear(load_transformer(tmp_path / "checkpoint-6"))
    assert_linear(load_pipeline(result.pipeline).transformer)
    assert load_pipeline(result.pipeline).labels["7"] == 7
    for picture in ("samples/step-0000003.png", "samples/final.png", "loss.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width > 64
    assert list(tmp_path.glob("lintra/events*"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_precisions_on_a_gpu(teacher, tmp_path, precision):
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process, otherwise
    training = {"mixed_precision": precision, "max_train_steps": 20}
    result = Trainer(distillation_recipe(tmp_path, teacher, training=training)).run()
    rows = losses(tmp_path)
    assert all(row["loss"] < 3 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert_linear(load_pipeline(result.pipeline).transformer)


def test_softmax_attention_is_never_that_of_cudnn(tmp_path):
    trainer = Trainer(digits_recipe(tmp_path))
    used, call = [], trainer.task.objective.family.__call__
    trainer.task.objective.family = lambda *arguments: (
        used.append(torch.backends.cuda.cudnn_sdp_enabled()) or call(*arguments)
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    trainer.run()
    assert used
    assert not any(used)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_the_pipeline_has_the_averaged_weights(tmp_path):
    checkpoint = {"checkpointing_steps": 6}
    averaged = Trainer(digits_recipe(tmp_path / "a", checkpoint=checkpoint)).run().pipeline
    raw = weights(tmp_path / "a" / "checkpoint-6")
    assert not torch.equal(weights(averaged)["proj_out_2.weight"], raw["proj_out_2.weight"])
    plain = digits_recipe(tmp_path / "b", ema={"use_ema": False}, checkpoint=checkpoint)
    assert torch.equal(
        weights(Trainer(plain).run().pipeline)["proj_out_2.weight"], raw["proj_out_2.weight"]
    )


def test_resume_is_exact(teacher, tmp_path):
    groups = {
        "training": {
            "gradient_accumulation_steps": 2,
            "lr_scheduler": "cosine",
            "gradient_checkpointing": True,
        },
        "data": {"random_flip": True},
        "checkpoint": {"checkpointing_steps": 3},
    }
    whole = Trainer(distillation_recipe(tmp_path / "whole", teacher, **groups)).run()
    half = {**groups, "training": {**groups["training"], "max_train_steps": 6}}
    interrupted = Trainer(distillation_recipe(tmp_path / "parts", teacher, **half))
    interrupted.keeper.save = _then_stop(interrupted.keeper.save)
    with pytest.raises(_Killed):
        interrupted.run()
    resume = {**groups["checkpoint"], "resume_from_checkpoint": "latest"}
    recipe = distillation_recipe(tmp_path / "parts", teacher, **{**groups, "checkpoint": resume})
    resumed = Trainer(recipe)
    assert resumed.step == 3
    result = resumed.run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    expected, found = weights(whole.pipeline), weights(result.pipeline)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.gpu
def test_resume_on_a_gpu(teacher, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    checkpoint = {"checkpointing_steps": 3}
    interrupted = Trainer(distillation_recipe(tmp_path, teacher, checkpoint=checkpoint))
    interrupted.keeper.save = _then_stop(interrupted.keeper.save)
    with pytest.raises(_Killed):
        interrupted.run()
    resume = {**checkpoint, "resume_from_checkpoint": "latest"}
    resumed = Trainer(distillation_recipe(tmp_path, teacher, checkpoint=resume))
    assert all(average.is_cuda for average in resumed.ema.shadow_params)
    assert resumed.run().step == 6


class _Killed(Exception):
    pass


def _then_stop(save):
    def save_and_stop(step):
        save(step)
        raise _Killed

    return save_and_stop


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_leaves_a_checkpoint(signum, tmp_path):
    command = [sys.executable, "-m", "lintra.tools.train", f"--output_dir={tmp_path}"]
    command += [f"--config={_write_yaml(tmp_path / 'recipe.yaml')}"]
    command += ["--training.max_train_steps=100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(losses(tmp_path)) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    step = losses(tmp_path)[-1]["step"]
    assert f"stopped at step {step}; resume with" in errors
    assert str(tmp_path / f"checkpoint-{step}") in errors
    resume = {"resume_from_checkpoint": str(tmp_path / f"checkpoint-{step}")}
    recipe = digits_recipe(tmp_path, checkpoint=resume, training={"max_train_steps": step + 1})
    assert Trainer(recipe).run().step == step + 1


def _write_yaml(file: Path) -> Path:
    from dataclasses import asdict

    file.write_text(json.dumps(asdict(digits_recipe(file.parent))))  # JSON is YAML
    return file


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    original = Objective.__call__
    calls = []

    def poisoned(self, *arguments):
        calls.append(None)
        loss, terms = original(self, *arguments)
        return (loss * float("nan"), terms) if len(calls) == 4 else (loss, terms)

    monkeypatch.setattr(Objective, "__call__", poisoned)
    recipe = digits_recipe(tmp_path, checkpoint={"checkpointing_steps": 1})
    with pytest.raises(TrainingDiverged, match=r"loss nan.* step 4; the last good .*checkpoint-3"):
        Trainer(recipe).run()
    monkeypatch.undo()
    resume = {"checkpointing_steps": 0, "resume_from_checkpoint": "latest"}
    assert Trainer(digits_recipe(tmp_path, checkpoint=resume)).run().step == 6


def test_a_corrupt_checkpoint_is_one_clear_error(tmp_path):
    Trainer(digits_recipe(tmp_path, checkpoint={"checkpointing_steps": 6})).run()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    file = tmp_path / "checkpoint-6" / "optimizer.bin"
    os.truncate(file, file.stat().st_size // 2)
    resume = {"resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="must be a whole checkpoint, but .*checkpoint-6 cannot"):
        Trainer(digits_recipe(tmp_path, checkpoint=resume))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    resume = {"resume_from_checkpoint": str(tmp_path)}
    with pytest.raises(ValueError, match="resume_from_checkpoint` must be a checkpoint folder"):
        Trainer(digits_recipe(tmp_path, checkpoint=resume))


@pytest.fixture(scope="module")
def latent_teacher(tmp_path_factory):
    """Pipeline of a DiT on 8 x 8 latents of 16 x 16 RGB images."""
    folder = tmp_path_factory.mktemp("latent") / "pipeline"
    tiny_pipeline(tiny_dit(num_layers=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Class folders of RGB images."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(8):
        file = folder / f"class{index % 2}" / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (20, 18, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(file)
    return folder


@pytest.mark.parametrize("cached", [False, True], ids=["encoded", "cached"])
def test_latent_space(latent_teacher, photographs, cached, tmp_path):
    cache = str(tmp_path / "cache") if cached else None
    data = {
        "source": "imagefolder",
        "path": str(photographs),
        "resolution": 16,
        "random_flip": True,
        "latent_cache": cache,
    }
    recipe = distillation_recipe(tmp_path / "run", latent_teacher, data=data)
    result = Trainer(recipe).run()
    pipeline = load_pipeline(result.pipeline)
    assert pipeline.labels == {"class0": 0, "class1": 1}
    assert not pipeline.scheduler.config.clip_sample
    if cached:
        Trainer(recipe)  # opens the cache that the first run made
        other = tmp_path / "other_vae"
        tiny_vae().save_pretrained(other)
        with pytest.raises(ValueError, match="must be made with the VAE"):
            Trainer(
                distillation_recipe(
                    tmp_path / "run", latent_teacher, data=data, model={"vae": str(other)}
                )
            )


def test_models_of_earlier_steps_become_donors(teacher, tmp_path):
    """The donor's age: a student inherits from one pipeline and learns from another."""
    folder = tmp_path / "teacher"
    checkpoint = {"pipeline_steps": [2, 4]}
    recipe = digits_recipe(folder, checkpoint=checkpoint, ema={"use_ema": False})
    final = Trainer(recipe).run().pipeline
    two = weights(folder / "pipeline-2")
    assert not torch.equal(two["proj_out_2.weight"], weights(final)["proj_out_2.weight"])
    model = {"pretrained_donor_model": str(folder / "pipeline-2")}
    trainer = Trainer(distillation_recipe(tmp_path / "student", teacher, model=model))
    student, taught_by = trainer.models.student, trainer.models.teacher
    assert student.proj_out_2.weight.equal(two["proj_out_2.weight"])
    assert taught_by.proj_out_2.weight.equal(weights(teacher)["proj_out_2.weight"])
    alone = {"pretrained_teacher_model": None, "kind": "dit", "inherit": "all", "config": {}}
    recipe = digits_recipe(tmp_path / "control", model=model | alone)
    control = Trainer(recipe).models.student
    assert all(torch.equal(two[name], tensor) for name, tensor in control.state_dict().items())


def test_a_lit_continues_at_twice_the_resolution(teacher, tmp_path):
    small = Trainer(distillation_recipe(tmp_path / "small", teacher)).run().pipeline
    model = {"pretrained_teacher_model": None, "pretrained_donor_model": str(small)}
    model |= {"kind": "lit", "inherit": "all", "config": {"sample_size": 16}}
    model["config"] |= {"interpolation_scale": 2.0}
    recipe = digits_recipe(tmp_path / "large", model=model, data={"resolution": 16})
    trainer = Trainer(recipe)
    student = trainer.models.student
    assert all(torch.equal(weights(small)[n], tensor) for n, tensor in student.state_dict().items())
    pipeline = load_pipeline(trainer.run().pipeline)
    assert pipeline.transformer.config.sample_size == 16
    assert pipeline.transformer.pos_embed.interpolation_scale == 2.0
    model["pretrained_teacher_model"] = str(teacher)
    recipe = digits_recipe(tmp_path / "never", model=model, data={"resolution": 16})
    _fails(recipe, "sample_size` must be the teacher's 8, got 16")


def test_images_in_memory_and_noise_on_the_device_change_nothing_on_a_cpu(tmp_path):
    flips = {"random_flip": True}
    Trainer(digits_recipe(tmp_path / "plain", data=flips)).run()
    fast = {"data": {**flips, "in_memory": True}, "training": {"noise_on_device": True}}
    Trainer(digits_recipe(tmp_path / "fast", **fast)).run()
    assert losses(tmp_path / "plain") == losses(tmp_path / "fast")
    with pytest.raises(ValueError, match="`data.in_memory` must be false with a latent cache"):
        digits_recipe(tmp_path, data={"in_memory": True, "latent_cache": "x"})


def test_a_reduced_checkpoint_resumes_from_the_averaged_weights(tmp_path):
    steps = {"training": {"max_train_steps": 4}, "checkpoint": {"checkpointing_steps": 4}}
    averaged = Trainer(digits_recipe(tmp_path / "run", **steps)).run().pipeline
    whole, reduced = tmp_path / "run" / "checkpoint-4", tmp_path / "carried" / "checkpoint-4"
    reduce_to_weights(whole, reduced)
    assert {path.name for path in reduced.iterdir()} == {"transformer", "run.json"}
    resume = {"checkpoint": {"resume_from_checkpoint": "latest"}}
    trainer = Trainer(digits_recipe(tmp_path / "carried", **resume))
    assert trainer.step == 4
    assert trainer.ema.optimization_step == 4
    expected = weights(averaged)["proj_out_2.weight"].bfloat16().float()
    assert trainer.models.student.proj_out_2.weight.equal(expected)
    assert any(torch.equal(expected, average) for average in trainer.ema.shadow_params)
    assert trainer.run().step == 6
    assert [row["step"] for row in losses(tmp_path / "carried")] == [5, 6]


def _fails(recipe, message):
    with pytest.raises(ValueError, match=message):
        Trainer(recipe)


def test_recipes_that_do_not_fit(teacher, latent_teacher, photographs, tmp_path):
    def student(folder=teacher, **groups):
        return distillation_recipe(tmp_path / "never", folder, **groups)

    rgb = {"source": "imagefolder", "path": str(photographs)}
    _fails(student(data={"resolution": 16}), "`data.resolution` must be 8, .* got 16")
    _fails(student(data={"channels": 3}), "`data.channels` must be the 1 of the autoencoder, got 3")
    _fails(student(data={"latent_cache": "x"}), "`data.latent_cache` must be none in pixel space")
    _fails(
        student(latent_teacher, data={**rgb, "resolution": 8}),
        "`data.resolution` must be 16, the model's sample size 8 times 2, got 8",
    )
    _fails(student(noise={"beta_end": 0.03}), "`noise.beta_end` must be that of the teacher's")
    config = {"config": {"sample_size": 16}}
    _fails(student(model=config), "`model.config.sample_size` must be the teacher's 8, got 16")
    _fails(student(model={"config": {"num_layers": 2}}), "`teacher` must fit .* num_layers 2 != 1")
    few = {"config": {**digits_recipe(tmp_path).model.config, "num_embeds_ada_norm": 3}}
    _fails(
        digits_recipe(tmp_path / "never", model=few),
        "`model.config.num_embeds_ada_norm` must be at least the 10 classes of the data, got 3",
    )
    fixed = {"config": {**digits_recipe(tmp_path).model.config, "out_channels": 1}}
    _fails(
        digits_recipe(tmp_path / "never", model=fixed),
        "`loss.vlb` must be 0 for models without variance channels",
    )
    assert not (tmp_path / "never").exists()


def test_two_processes_train_and_resume(teacher, tmp_path):
    config = _write_yaml(tmp_path / "recipe.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--standalone", "-m", "lintra.tools.train", f"--config={config}"]
    launch += ["--checkpoint.checkpointing_steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for steps in (2, 4):
        command = [*launch, f"--training.max_train_steps={steps}"]
        command += [f"--output_dir={tmp_path / 'parts'}"]
        command += ["--checkpoint.resume_from_checkpoint=latest"]
        subprocess.run(command, check=True, env=environment, timeout=200)
    command = [*launch, "--training.max_train_steps=4", f"--output_dir={tmp_path / 'whole'}"]
    subprocess.run(command, check=True, env=environment, timeout=200)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    state = json.loads((tmp_path / "parts" / "checkpoint-4" / "run.json").read_text())
    assert state == {"step": 4, "num_processes": 2}


def test_compiled_blocks_train_alike(teacher, tmp_path, monkeypatch):
    # Inductor takes half a minute to compile on a CPU; what is traced is the same.
    monkeypatch.setattr(loop, "compile_blocks", partial(compile_blocks, backend="eager"))
    training = {"max_train_steps": 2}
    Trainer(distillation_recipe(tmp_path / "plain", teacher, training=training)).run()
    training["compile_blocks"] = True
    recipe = distillation_recipe(tmp_path / "fast", teacher, training=training)
    pipeline = load_pipeline(Trainer(recipe).run().pipeline)
    for plain, fast in zip(losses(tmp_path / "plain"), losses(tmp_path / "fast"), strict=True):
        assert fast == pytest.approx(plain, rel=1e-3)
    assert set(pipeline.transformer.state_dict()) == set(weights(tmp_path / "plain" / "pipeline"))
    with pytest.raises(ValueError, match="`model` must have transformer_blocks, got a Linear"):
        compile_blocks(torch.nn.Linear(1, 1))
