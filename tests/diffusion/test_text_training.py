"""Text-to-image runs of the one loop: CLEAR on FLUX and SD3, LiT on PixArt."""

import os
from dataclasses import replace
from itertools import islice

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from lintra.diffusion import assert_linear, load_pipeline, load_transformer
from lintra.diffusion.clear_weights import clear_parameter_names
from lintra.diffusion.losses import LOSS_TERMS
from lintra.diffusion.training.batches import make_loader, step_generator
from lintra.diffusion.training.loop import Trainer
from lintra.diffusion.training.metrics import read_metrics
from lintra.diffusion.training.objective import Objective
from tiny_models import pixel_pipeline, tiny_dit
from tiny_recipes import TEXT_LOSSES, digits_recipe, text_recipe
from tiny_text import make_tiny_cache, tiny_text_pipeline

FAMILIES = ("flux", "sd3", "pixart")
CLEAR = ("flux", "sd3")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Pipeline folder and cache of each family."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        tiny_text_pipeline(family).save_pretrained(folder / "pipeline")
        found[family] = folder / "pipeline", make_tiny_cache(folder / "cache", folder / "pipeline")
    return found


@pytest.fixture
def recipe(places, tmp_path):
    def make(family, name="run", **groups):
        return text_recipe(tmp_path / name, family, *places[family], **groups)

    return make


def rows_of(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def draw(pipeline, **changes):
    options = {"height": 16, "width": 8, "num_inference_steps": 2, "output_type": "pt"}
    if "PixArt" in type(pipeline).__name__:
        options["use_resolution_binning"] = False
    generator = torch.Generator().manual_seed(0)
    options |= {"generator": generator, "max_sequence_length": 8, **changes}
    return pipeline("a red cube", **options).images


def batch_of(trainer):
    place = {"seed": 0, "start": 0, "rank": 0, "num_processes": 1, "num_workers": 0}
    batch = next(iter(make_loader(trainer.task.data.dataset, 2, **place)))
    return trainer.task.data.prepare(batch, step_generator(0, 0, 0))


def loss_of(trainer, clean, condition):
    models = trainer.models
    return trainer.task.objective(
        trainer.model, models.teacher, clean, condition, step_generator(0, 0, 0)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_from_recipe_to_pipeline(places, recipe, family, tmp_path):
    made = recipe(
        family,
        validation={"num_validation_images": 2, "validation_steps": 3},
        checkpoint={"checkpointing_steps": 2},
    )
    result = Trainer(made).run()
    weights = TEXT_LOSSES[family]
    for row in rows_of(tmp_path / "run"):
        total = sum(weight * row[f"loss_{name}"] for name, weight in weights.items())
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    pictures = {file.name for file in (tmp_path / "run" / "samples").iterdir()}
    assert pictures == {"step-0000003.png", "final.png"}
    pipeline, teacher = load_pipeline(result.pipeline), load_pipeline(places[family][0])
    assert type(pipeline) is type(teacher)
    assert_linear(pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    assert draw(pipeline).isfinite().all()
    # Text encoders are the teacher's very files.
    for name in ("text_encoder", "tokenizer"):
        for file in (places[family][0] / name).iterdir():
            assert os.path.samefile(file, result.pipeline / name / file.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_is_exact(recipe, family, tmp_path):
    groups = {
        "training": {
            "max_train_steps": 4,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
        },
        "data": {"proportion_empty_prompts": 0.3},
        "ema": {"use_ema": True, "ema_decay": 0.5},
        "checkpoint": {"checkpointing_steps": 2},
    }
    whole = Trainer(recipe(family, "whole", **groups)).run()
    parts = recipe(family, "parts", **groups)
    first = Trainer(parts)
    first.recipe = replace(parts, training=replace(parts.training, max_train_steps=2))
    first.run()
    checkpoint = replace(parts.checkpoint, resume_from_checkpoint="latest")
    resumed = Trainer(replace(parts, checkpoint=checkpoint))
    assert resumed.step == 2
    result = resumed.run()
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    expected, found = (load_transformer(r.pipeline).state_dict() for r in (whole, result))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("family", CLEAR)
@pytest.mark.parametrize("trainable", ["clear", "lora"])
def test_the_teacher_stays_as_it_was_and_shares_what_is_frozen(
    places, recipe, family, trainable, tmp_path
):
    model, training = {"trainable": trainable, "rank": 2}, {"max_train_steps": 2}
    trainer = Trainer(recipe(family, model=model, training=training))
    student, teacher = trainer.models.student, trainer.models.teacher
    theirs = {value.untyped_storage().data_ptr() for value in teacher.parameters()}
    named = dict(student.named_parameters())
    trained = {name for name, value in named.items() if value.requires_grad}
    shared = {n for n, value in named.items() if value.untyped_storage().data_ptr() in theirs}
    assert shared == named.keys() - trained
    if trainable == "clear":
        assert trained == set(clear_parameter_names(student))
    else:
        assert all(".lora_" in name for name in trained)
        layers = [n for n in clear_parameter_names(load_transformer_like(student)) if "weight" in n]
        assert len(trained) == 2 * len(layers)
    before = {name: named[name].detach().clone() for name in trained}
    result = trainer.run()
    original = load_transformer(places[family][0]).state_dict()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, original[name]), name
    assert not any(torch.equal(before[name], named[name]) for name in trained)
    optimizer = trainer.optimizer.state_dict()
    assert len(optimizer["state"]) == len(trained)
    # The student that is saved differs from the teacher in the trained set alone.
    saved = load_transformer(result.pipeline).state_dict()
    assert saved.keys() == original.keys()
    changed = {name for name in saved if not torch.equal(saved[name], original[name])}
    if trainable == "clear":
        assert changed == trained
        flat = load_file(tmp_path / "run" / "trained.safetensors")
        assert all(torch.equal(flat[name], saved[name]) for name in changed)
        assert flat.keys() == trained
    else:
        plain = {n.replace("base_layer.", "").split(".lora_")[0] + ".weight" for n in trained}
        assert changed == plain


def load_transformer_like(student):
    """The model without its adapters."""
    return type(student)(**{k: v for k, v in student.config.items() if not k.startswith("_")})


@pytest.mark.parametrize("family", CLEAR)
def test_lora_files_open_in_a_pipeline(places, recipe, family, tmp_path):
    training = {"max_train_steps": 2, "learning_rate": 1e-2}
    lora = {"trainable": "lora", "rank": 2}
    result = Trainer(recipe(family, model=lora, training=training)).run()
    merged = load_pipeline(result.pipeline)
    teacher = load_pipeline(places[family][0])
    student = type(merged.transformer).from_teacher(teacher.transformer, radius=2)
    teacher.register_modules(transformer=student)
    for pipeline in (merged, teacher):
        pipeline.set_progress_bar_config(disable=True)
    without = draw(teacher)
    teacher.load_lora_weights(str(tmp_path / "run" / "lora"), use_safetensors=True)
    expected = draw(teacher)
    assert (expected - without).abs().max() > 1e-4
    torch.testing.assert_close(draw(merged), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", CLEAR)
def test_the_loss_is_that_of_clear(recipe, family):
    trainer = Trainer(recipe(family, model={"attention_layers": [0, 2]}))
    models, objective = trainer.models, trainer.task.objective
    clean, condition = batch_of(trainer)
    _, terms = loss_of(trainer, clean, condition)

    draws = step_generator(0, 0, 0)
    noise = torch.randn(clean.shape, generator=draws)
    level = objective.process.draw(2, draws)
    noised = objective.process.add_noise(clean, noise, level)
    seen = {"student": [], "teacher": []}
    for name, model in (("student", models.student), ("teacher", models.teacher)):
        blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
        for block in (blocks[0], blocks[2]):
            for layer in (block.attn, getattr(block, "attn2", None)):
                if layer is not None:
                    layer.register_forward_hook(
                        lambda _, __, out, name=name: seen[name].append(out)
                    )
    with torch.no_grad():
        pair = (models.student, models.teacher)
        outs = [objective.family(model, noised, level, condition) for model in pair]
    torch.testing.assert_close(terms["flow"], (outs[0] - (noise - clean)).square().mean())
    torch.testing.assert_close(terms["output_distillation"], (outs[0] - outs[1]).square().mean())
    flat = [
        [out if torch.is_tensor(out) else torch.cat(out, 1) for out in outs]
        for outs in seen.values()
    ]
    assert len(flat[0]) == (3 if family == "sd3" else 2)
    expected = sum((a - b).square().mean() for a, b in zip(*flat, strict=True))
    torch.testing.assert_close(terms["attention_distillation"], expected)


@pytest.mark.parametrize("loss", [None, {"attention_transfer": 1.0}], ids=["clear", "transfer"])
@pytest.mark.parametrize("family", CLEAR)
def test_gradient_checkpointing_changes_nothing(recipe, family, loss):
    gradients = []
    for checkpointing in (False, True):
        groups = {} if loss is None else {"loss": loss}
        training = {"gradient_checkpointing": checkpointing}
        trainer = Trainer(recipe(family, training=training, **groups))
        total, _ = loss_of(trainer, *batch_of(trainer))
        total.backward()
        gradients.append([total.detach(), *(value.grad for value in trainer.trained)])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("family", CLEAR)
def test_attention_transfer_matches_each_layer_on_the_teachers_inputs(recipe, family):
    made = recipe(
        family,
        loss={"attention_transfer": 1.0},
        training={"max_train_steps": 20, "learning_rate": 1e-3},
    )
    trainer = Trainer(made)
    student, teacher = trainer.models.student, trainer.models.teacher
    names = [name for _, name, _ in student._attention_layers()]
    calls = {}
    hooks = [
        teacher.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, out, name=name: calls.update({name: (args, kwargs, out)}),
            with_kwargs=True,
        )
        for name in names
    ]
    clean, condition = batch_of(trainer)
    total, _ = loss_of(trainer, clean, condition)
    for hook in hooks:
        hook.remove()
    expected = torch.zeros(())
    grid = (clean.shape[2] // 2, clean.shape[3] // 2)
    for name, (args, kwargs, out) in calls.items():
        with torch.no_grad():
            layer = student.get_submodule(name)
            mine = layer.forward(*args, **kwargs, spatial_shape=grid, radius=2)
        a, b = (x if torch.is_tensor(x) else torch.cat(x, 1) for x in (mine, out))
        expected += (a - b).square().mean()
    torch.testing.assert_close(total.detach(), expected)
    trainer.run()
    assert loss_of(trainer, clean, condition)[0] < 0.9 * total


def test_stages_follow_one_another(recipe, tmp_path):
    short = {"training": {"max_train_steps": 1}}
    first = Trainer(recipe("flux", "first", loss={"attention_transfer": 1.0}, **short)).run()
    for start in (first.pipeline, tmp_path / "first" / "trained.safetensors"):
        trainer = Trainer(recipe("flux", model={"pretrained_model_name_or_path": str(start)}))
        saved = load_transformer(first.pipeline).state_dict()
        mine = trainer.models.student.state_dict()
        assert all(torch.equal(mine[name], saved[name]) for name in saved)
        assert trainer.models.teacher.proj_out.weight.data_ptr() == (
            trainer.models.student.proj_out.weight.data_ptr()
        )
    pixart = Trainer(recipe("pixart", "p", **short)).run()
    start = {"pretrained_model_name_or_path": str(pixart.pipeline)}
    mine = Trainer(recipe("pixart", model=start)).models.student.state_dict()
    saved = load_transformer(pixart.pipeline).state_dict()
    assert all(torch.equal(mine[name], saved[name]) for name in saved)
    with pytest.raises(ValueError, match="must be a ClearFluxTransformer2DModel, got a LiTPixArt"):
        Trainer(recipe("flux", model=start))
    other = {"config": {"num_linear_heads": 4}}
    with pytest.raises(ValueError, match="must have the student's weights, got .* that differ"):
        Trainer(recipe("pixart", model={**start, **other}))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(recipe, family, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process, otherwise
    training = {"mixed_precision": "bf16", "max_train_steps": 2}
    trainer = Trainer(recipe(family, training=training))
    assert {value.dtype for value in trainer.trained} == {torch.float32}
    assert trainer.models.teacher.dtype == torch.bfloat16
    result = trainer.run()
    AcceleratorState._reset_state(reset_partial_state=True)
    file = result.pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    dtypes = {value.dtype for value in load_file(file).values()}
    assert dtypes == {torch.float32 if family == "pixart" else torch.bfloat16}
    assert rows_of(tmp_path / "run")[-1]["loss"] < 10


@pytest.mark.parametrize("family", FAMILIES)
def test_controls_and_teachers(places, recipe, family, tmp_path):
    """The stock model goes on from its teacher, or learns from nothing."""
    single = {"pixart": {"noise": 1.0, "vlb": 1.0}}.get(family, {"flow": 1.0})
    control = {"kind": family, "config": {}, "trainable": "all", "inherit": "all_but_attention"}
    short = {"max_train_steps": 2}
    Trainer(recipe(family, "control", model=control, loss=single, training=short)).run()
    teacher = load_transformer(places[family][0])
    config = {k: v for k, v in teacher.config.items() if not k.startswith("_")}
    scratch = {"kind": family, "config": config, "pretrained_teacher_model": None}
    scratch |= {"vae": str(places[family][0] / "vae")}
    made = recipe(family, "scratch", model=scratch, loss=single, training=short)
    result = Trainer(made).run()
    assert type(load_transformer(result.pipeline)) is type(teacher)


def test_prompts_are_dropped_for_both(places, recipe):
    trainer = Trainer(recipe("pixart", data={"proportion_empty_prompts": 0.5}))
    seen = []
    objective: Objective = trainer.task.objective
    family = objective.family

    def spy(model, noised, timestep, condition):
        seen.append(condition)
        return family(model, noised, timestep, condition)

    objective.family = spy
    clean, condition = batch_of(trainer)
    empty = trainer.task.data.dataset.empty
    dropped = []
    for step in range(20):
        seen.clear()
        objective(
            trainer.model, trainer.models.teacher, clean, condition, step_generator(0, step, 0)
        )
        for name in empty:
            assert torch.equal(seen[0][name], seen[1][name])
        for row in range(2):
            dropped.append(torch.equal(seen[0]["prompt_embeds"][row], empty["prompt_embeds"]))
            kept = condition["prompt_embeds"][row]
            assert dropped[-1] or torch.equal(seen[0]["prompt_embeds"][row], kept)
    assert 8 < sum(dropped) < 32


def test_batches_hold_one_size(recipe):
    trainer = Trainer(recipe("pixart"))
    place = {"seed": 0, "start": 0, "rank": 0, "num_processes": 1, "num_workers": 0}
    loader = make_loader(trainer.task.data.dataset, 2, **place)
    sizes = {tuple(batch["mean"].shape[-2:]) for batch in islice(loader, 4)}
    assert sizes == {(4, 8), (8, 8)}


def test_pixart_of_1024_px_is_told_the_size(places, tmp_path):
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, added_cond_kwargs, **_):
            seen.append(added_cond_kwargs)
            return (x,)

    from lintra.diffusion.training.families import PixArtFamily

    condition = {"prompt_embeds": torch.zeros(2, 1, 1), "prompt_attention_mask": torch.ones(2, 1)}
    for told in (True, False):
        family = PixArtFamily({}, told, 8)
        family(Spy(), torch.zeros(2, 4, 16, 32), torch.zeros(2).long(), condition)
    assert seen[0]["resolution"].tolist() == [[128, 256]] * 2
    assert seen[0]["aspect_ratio"].tolist() == [[0.5]] * 2
    assert seen[1] == {"resolution": None, "aspect_ratio": None}


def fails(recipe, message):
    with pytest.raises(ValueError, match=message):
        Trainer(recipe)


def test_recipes_that_do_not_fit(places, recipe, tmp_path):
    with pytest.raises(ValueError, match="`data.source` must be prompt_cache for clear_flux"):
        recipe("flux", data={"source": "digits"})
    with pytest.raises(ValueError, match="`data.source` must not be prompt_cache for dit, got"):
        digits_recipe(tmp_path, data={"source": "prompt_cache", "path": str(tmp_path)})
    with pytest.raises(ValueError, match="`loss.flow` must be 0 for a model of ddpm"):
        recipe("pixart", loss={"flow": 1.0})
    with pytest.raises(ValueError, match="must be 0 for models other than CLEAR's"):
        recipe("pixart", loss={"attention_transfer": 1.0})
    cache = {"path": str(places["sd3"][1])}
    fails(recipe("flux", data=cache), "must be made for flux, got sd3")
    fails(recipe("flux", data={"path": str(tmp_path)}), "must be a prompt cache with an index.json")
    other = str(places["pixart"][0])
    fails(
        recipe("flux", model={"pretrained_teacher_model": other}),
        "prompt cache .* must be made with the text encoders",
    )
    fails(recipe("flux", model={"config": {"radius": 0}}), "`radius` must be at least 1, got 0")
    fails(recipe("flux", model={"config": {"num_layers": 1}}), "`teacher` must hold the weights")
    fails(recipe("flux", model={"attention_layers": [9]}), "`model.attention_layers` must be in 0")
    fails(
        recipe("flux", model={"vae": str(tmp_path / "vae")} | _other_vae(tmp_path)),
        "must be made with the VAE",
    )
    fails(recipe("pixart", model={"trainable": "lora"}), "`model.trainable` must be all for a LiT")
    fails(
        recipe("flux", model={"kind": "flux"}, loss={"flow": 1.0}),
        "`model.config` must be empty for a flux that goes on",
    )
    with pytest.raises(ValueError, match="`loss.noise` must be 0 for a model of flow"):
        recipe("flux", loss={"noise": 1.0})


def _other_vae(tmp_path):
    tiny_text_pipeline("flux", seed=3).vae.save_pretrained(tmp_path / "vae")
    return {}


def test_teachers_that_do_not_fit(places, recipe, tmp_path):
    pixel_pipeline(tiny_dit(in_channels=1, out_channels=2)).save_pretrained(tmp_path / "dit")
    fails(
        recipe("flux", model={"pretrained_teacher_model": str(tmp_path / "dit")}),
        "`model.pretrained_teacher_model` must be a FluxPipeline, got a DiTPipeline",
    )
    pipeline = tiny_text_pipeline("pixart")
    pipeline.register_modules(transformer=None)
    pipeline.save_pretrained(tmp_path / "none")
    fails(
        recipe("pixart", model={"pretrained_teacher_model": str(tmp_path / "none")}),
        "`model.pretrained_teacher_model` must have a transformer, got none in",
    )
    made = recipe("pixart")
    noise = replace(made.noise, beta_end=0.03)
    fails(replace(made, noise=noise), "`noise.beta_end` must be that of the teacher's")
    scratch = {"kind": "flux", "config": {"num_layers": 1}, "pretrained_teacher_model": None}
    fails(recipe("flux", model=scratch, loss={"flow": 1.0}), "`model.vae` must be given without")
    assert {"flow", "output_distillation"} < LOSS_TERMS.keys()
