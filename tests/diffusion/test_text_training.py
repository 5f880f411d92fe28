"""Text-to-image runs of the one loop: CLEAR on FLUX and SD3, LiT on PixArt."""

import os
from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from lintra.diffusion import assert_linear, load_pipeline, load_transformer
from lintra.diffusion.clear_weights import clear_parameter_names
from lintra.diffusion.models.autoencoder_pixel import PixelAutoencoder
from lintra.diffusion.training.batches import make_loader, step_generator
from lintra.diffusion.training.families import PixArtFamily
from lintra.diffusion.training.loop import Trainer
from lintra.diffusion.training.metrics import read_metrics
from lintra.diffusion.training.objective import Objective
from lintra.diffusion.training.prompt_cache_build import build_prompt_cache
from lintra.diffusion.training.prompt_cache_writer import Encoders
from tiny_clear import FLUX
from tiny_pixart import tiny_lit_pixart
from tiny_recipes import TEXT_LOSSES, text_recipe
from tiny_text import make_places

FAMILIES = ("flux", "sd3", "pixart")
CLEAR = ("flux", "sd3")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("places"), *FAMILIES)


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


def test_a_cache_in_memory_trains_alike(recipe, tmp_path):
    Trainer(recipe("flux", "disk")).run()
    Trainer(recipe("flux", "memory", data={"in_memory": True})).run()
    assert rows_of(tmp_path / "disk") == rows_of(tmp_path / "memory")


def test_no_steps_give_the_student_as_it_starts(places, recipe):
    result = Trainer(recipe("flux", training={"max_train_steps": 0})).run()
    assert (result.step, result.signum) == (0, None)
    found, expected = (
        load_transformer(f).state_dict() for f in (result.pipeline, places["flux"][0])
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_host_does_not_read_the_grid_off_the_ids(recipe, monkeypatch):
    from lintra.diffusion.models import transformer_clear_flux

    monkeypatch.setattr(transformer_clear_flux, "grid_of_ids", None)
    trainer = Trainer(recipe("flux"))
    assert loss_of(trainer, *batch_of(trainer))[0].isfinite()


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

    condition = {"prompt_embeds": torch.zeros(2, 1, 1), "prompt_attention_mask": torch.ones(2, 1)}
    for told in (True, False):
        family = PixArtFamily({}, told, 8)
        family(Spy(), torch.zeros(2, 4, 16, 32), torch.zeros(2).long(), condition)
    assert seen[0]["resolution"].tolist() == [[128, 256]] * 2
    assert seen[0]["aspect_ratio"].tolist() == [[0.5]] * 2
    assert seen[1] == {"resolution": None, "aspect_ratio": None}
    sizes = {"attention_head_dim": 12, "cross_attention_dim": 48}
    model = tiny_lit_pixart(**sizes, use_additional_conditions=True)
    family = PixArtFamily(model.config, model.use_additional_conditions, 8)
    condition = {**condition, "prompt_embeds": torch.randn(2, 1, 12)}
    latents = torch.randn(2, 4, 8, 16)
    wide, told = (family(model, x, torch.tensor([5, 9]), condition) for x in (latents, latents.mT))
    assert wide.shape == (2, 8, 8, 16)
    assert told.shape == (2, 8, 16, 8)


@pytest.mark.parametrize("trainable", ["clear", "lora"])
def test_pooling_kernels_learn_too(places, recipe, trainable, tmp_path):
    config = {"radius": 2, "down_factor": 2}
    made = recipe("flux", model={"trainable": trainable, "rank": 2, "config": config})
    result = Trainer(made).run()
    pooling = {
        name: value
        for name, value in load_transformer(result.pipeline).state_dict().items()
        if name.endswith("spatial_weight")
    }
    assert len(pooling) == 4
    assert not any(torch.equal(value, torch.full_like(value, 0.25)) for value in pooling.values())


@dataclass
class Tile:
    """A coloured image that a study holds in memory."""

    name: str
    caption: str

    def size(self):
        return (8, 8)

    def read(self):
        return torch.full((3, 8, 8), 100 + 50 * int(self.caption or 0), dtype=torch.uint8)


def test_a_study_in_pixel_space_with_its_own_prompts(tmp_path):
    """Class names as text: a teacher from scratch, then its CLEAR student."""
    table = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0))

    def encode(prompts):
        rows = table[[int(prompt or 2) for prompt in prompts]]
        return {"prompt_embeds": rows, "pooled_prompt_embeds": rows.mean(1)[:, :8].contiguous()}

    encoders = Encoders("flux", PixelAutoencoder(3), encode, "a table", {}, 4)
    tiles = [Tile(str(number), str(number % 2)) for number in range(4)]
    cache = build_prompt_cache(encoders, tmp_path / "cache", tiles, buckets=[(8, 8)])
    assert cache[0]["mean"].shape == (1, 3, 8, 8)
    torch.testing.assert_close(cache[1]["mean"], torch.full((1, 3, 8, 8), 150 / 127.5 - 1))
    common = {"validation": {"num_validation_images": 2, "num_inference_steps": 1}}
    scratch = {"kind": "flux", "config": {**FLUX, "in_channels": 12}}
    scratch |= {"pretrained_teacher_model": None, "trainable": "all"}
    places = (tmp_path / "teacher" / "pipeline", tmp_path / "cache")
    loss = {"flow": 1.0}
    made = text_recipe(tmp_path / "teacher", "flux", *places, model=scratch, loss=loss, **common)
    Trainer(made).run()
    result = Trainer(text_recipe(tmp_path / "student", "flux", *places, **common)).run()
    pipeline = load_pipeline(result.pipeline)
    assert_linear(pipeline.transformer)
    assert isinstance(pipeline.vae, PixelAutoencoder)
    rows = {name: value[None] for name, value in cache.empty.items()}
    images = pipeline(**rows, height=8, width=8, num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 8, 8)
