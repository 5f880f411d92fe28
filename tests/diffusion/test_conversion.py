"""From an official DiT file to a pipeline folder that samples, trains and says what it is."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.schedulers import scheduling_ddpm

from golden_cases import load_case
from lintra.diffusion import (
    LiTTransformer2DModel,
    OfficialDiTTransformer2DModel,
    PixelAutoencoder,
    assert_linear,
    load_pipeline,
)
from lintra.diffusion.conversion import LICENCE_NOTE, convert_official_dit, read_labels
from lintra.diffusion.ddpm import DDPMProcess
from lintra.diffusion.sampling import sample_images
from lintra.diffusion.training.assemble import build_models
from lintra.diffusion.training.config import ModelConfig
from lintra.tools import convert
from official_dit import arguments_of, official_file, official_state
from tiny_models import tiny_dit, tiny_pipeline, tiny_vae
from tiny_recipes import distillation_recipe

LATENT, PIXEL = "D_dit_s2like", "D_dit_p4_nosigma_nodrop"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory, vae):
    """Folder and report of the latent case, with an autoencoder and class names."""
    folder = tmp_path_factory.mktemp("converted")
    names = folder / "names.json"
    names.write_text(json.dumps({"3": "cat, kitty", "4": "dog"}))
    report = convert_official_dit(
        official_file(folder), folder / "out", vae=vae, id2label=names, num_heads=3
    )
    return folder / "out", report


def test_the_pipeline_opens_and_samples(converted, tmp_path):
    pipeline = load_pipeline(converted[0])
    assert isinstance(pipeline, DiTPipeline)
    assert isinstance(pipeline.transformer, OfficialDiTTransformer2DModel)
    assert pipeline.labels == {"cat": 3, "dog": 4, "kitty": 3}
    pipeline.save_pretrained(tmp_path)
    assert load_pipeline(tmp_path).labels == pipeline.labels
    images = sample_images(pipeline, [3, 9], num_inference_steps=2)
    assert images.shape == (2, 3, 16, 16)


def test_the_report_says_what_it_is(converted):
    folder, report = converted
    assert (report.name, report.image_size, report.vae) == ("DiT-2x48h3/2", 16, "AutoencoderKL")
    text = str(report)
    for part in ("a bare state dict of official.pt", "10 classes, label 10 for none", LICENCE_NOTE):
        assert part in text
    assert "form: the authors'" in text
    assert "DiTPipeline, which takes label 1000" in text
    card = (folder / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert text in card


def test_the_form_of_diffusers_opens_without_lintra(tmp_path):
    report = convert_official_dit(
        official_file(tmp_path), tmp_path / "out", form="diffusers", num_heads=3
    )
    assert "form: diffusers'" in str(report)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out", vae=None)
    assert type(pipeline.transformer) is DiTTransformer2DModel


def test_without_an_autoencoder(tmp_path, vae):
    convert_official_dit(official_file(tmp_path), tmp_path / "out", num_heads=3)
    pipeline = load_pipeline(tmp_path / "out")
    assert pipeline.vae is None
    with pytest.raises(ValueError, match="`pipeline` must have a vae, got None"):
        sample_images(pipeline, [3], num_inference_steps=2)
    pipeline = load_pipeline(tmp_path / "out", vae=tiny_vae())
    assert sample_images(pipeline, [3], num_inference_steps=2).shape == (1, 3, 16, 16)
    recipe = distillation_recipe(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="`model.vae` must be given for a teacher without an aut"):
        build_models(recipe, ["a"])
    model = {"vae": str(vae)}
    models = build_models(distillation_recipe(tmp_path / "run", tmp_path / "out", model=model), [])
    assert models.student.config.time_freq_shift == 0.0
    control = {"vae": str(vae), "kind": "dit", "inherit": "none"}
    recipe = distillation_recipe(tmp_path / "run", tmp_path / "out", model=control)
    assert isinstance(build_models(recipe, []).student, OfficialDiTTransformer2DModel)


def test_pixels_and_no_null_label(tmp_path):
    report = convert_official_dit(
        official_file(tmp_path, PIXEL), tmp_path / "out", **arguments_of(PIXEL)
    )
    assert report.image_size == 16
    assert "no label for none, variance fixed" in str(report)
    assert "guidance: none, the weights were trained without label dropout" in str(report)
    pipeline = load_pipeline(tmp_path / "out")
    assert isinstance(pipeline.vae, PixelAutoencoder)
    assert sample_images(pipeline, [6], num_inference_steps=2).shape == (1, 3, 16, 16)


def test_straight_to_a_student(tmp_path, vae):
    options = {"to": "lit", "policy": "with_kv", "vae": vae, "num_heads": 3, "num_linear_heads": 2}
    report = convert_official_dit(official_file(tmp_path), tmp_path / "out", **options)
    assert "inheritance, policy with_kv" in str(report)
    student = load_pipeline(tmp_path / "out").transformer
    assert isinstance(student, LiTTransformer2DModel)
    assert_linear(student)
    assert (student.config.time_freq_shift, student.config.norm_eps) == (0.0, 1e-6)
    attention = student.transformer_blocks[1].attn1
    assert attention.heads == 2
    qkv = official_state(LATENT)["blocks.1.attn.qkv.weight"].chunk(3)
    inherited = [
        torch.equal(layer.weight, part)
        for layer, part in zip((attention.to_q, attention.to_k, attention.to_v), qkv, strict=True)
    ]
    assert inherited == [False, True, True]
    convert_official_dit(official_file(tmp_path), tmp_path / "again", **options)
    again = load_pipeline(tmp_path / "again").transformer.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in student.state_dict().items())


def test_schedule_of_the_sampler(converted):
    _, tensors = load_case("E_ddpm_schedule")
    scheduler = load_pipeline(converted[0]).scheduler
    betas = scheduler.betas.double()
    torch.testing.assert_close(betas, tensors["linear1000.betas"], atol=0, rtol=1e-6)
    expected = tensors["linear1000.alphas_cumprod"]
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, atol=0, rtol=2e-4)
    scheduler.set_timesteps(50)
    assert torch.equal(scheduler.timesteps.flip(0), tensors["respaced_ddim50.timestep_map"])


def _assert_step(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The tolerance that the cases suggest."""
    atol = 2e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, atol=atol, rtol=3e-4)


@pytest.mark.parametrize(("case", "steps"), [("T1000", 1000), ("ddim50", 50)])
def test_ddim_steps_of_the_sampler(converted, case, steps):
    _, tensors = load_case(f"E_ddpm_steps_{case}")
    scheduler = load_pipeline(converted[0]).scheduler
    scheduler.set_timesteps(steps)
    # The pipeline drops the variance before the step.
    noise = tensors["model_output"][:, :4]
    for i, t in enumerate(tensors["model_t"].tolist()):
        x, expected = tensors["x"][i], tensors["noclip.ddim_eta0"][i]
        _assert_step(scheduler.step(noise[i], t, x).prev_sample, expected)


def test_ancestral_steps_with_the_learned_variance(converted, monkeypatch):
    _, tensors = load_case("E_ddpm_steps_T1000")
    config = load_pipeline(converted[0]).scheduler.config
    scheduler = DDPMScheduler.from_config(config, variance_type="learned_range")
    scheduler.set_timesteps(1000)
    for i, t in enumerate(tensors["model_t"].tolist()):
        fresh = tensors["fresh_noise"][i : i + 1]
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, noise=fresh, **k: noise)
        output, x = tensors["model_output"][i : i + 1], tensors["x"][i : i + 1]
        _assert_step(scheduler.step(output, t, x).prev_sample, tensors["noclip.ddpm"][i : i + 1])


def test_the_authors_250_ancestral_steps(converted, monkeypatch):
    """As the report says to sample: rounded steps from 0 to 999, not every fourth from 0."""
    folder, report = converted
    settings = {"variance_type": "learned_range", "timestep_spacing": "linspace"}
    assert all(f'{name}="{value}"' in str(report) for name, value in settings.items())
    scheduler = DDPMScheduler.from_config(load_pipeline(folder).scheduler.config, **settings)
    scheduler.set_timesteps(250)
    tables = load_case("E_ddpm_schedule")[1]
    torch.testing.assert_close(scheduler.timesteps.flip(0), tables["respaced_250.timestep_map"])
    process = DDPMProcess(tables["respaced_250.alphas_cumprod"])
    torch.manual_seed(0)
    x, output, fresh = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8, 8), torch.randn(1, 4, 8, 8)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: fresh)
    noise, variance = output.chunk(2, dim=1)
    for i in (0, 1, 2, 125, 248, 249):
        step = torch.tensor([i])
        expected = process.posterior_mean(process.predict_clean(x, noise, step), x, step)
        if i:
            expected = expected + fresh * (process.learned_log_variance(variance, step) / 2).exp()
        t = int(tables["respaced_250.timestep_map"][i])
        _assert_step(scheduler.step(output, t, x).prev_sample, expected)


def test_what_does_not_fit(tmp_path, vae):
    path, out = official_file(tmp_path), tmp_path / "out"

    def refuse(message: str, **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            convert_official_dit(path, out, **{"num_heads": 3, **options})
        assert not out.exists()

    refuse("`model` must be that of the checkpoint, DiT-2x48h3/2, got 'DiT-XL/2'", model="DiT-XL/2")
    refuse("`image_size` must be that of the checkpoint, 64, got 256", image_size=256)
    refuse("`image_size` must be that of the checkpoint, 16, got 64", image_size=64, vae=vae)
    refuse("`to` must be one of dit, lit, got 'sit'", to="sit")
    refuse(r"`to` must be lit to change .* \['num_linear_heads'\]", num_linear_heads=2)
    refuse(r"`overrides` must be arguments of LiT.*\['heads'\]", to="lit", heads=2)
    refuse("`policy` must be one of all_but_attention, .* got 'any'", to="lit", policy="any")
    refuse("`vae` must be the folder of an AutoencoderKL, got '.*none'", vae=tmp_path / "none")
    other = tiny_vae().config | {"latent_channels": 8}
    type(tiny_vae()).from_config(other).save_pretrained(tmp_path / "vae8")
    refuse("`vae` must give latents of 4 channels, got 8", vae=tmp_path / "vae8")
    refuse("`id2label` must be a JSON file, got 'none.json'", id2label="none.json")
    refuse("`id2label` must be names by class number", id2label={1: 2})
    refuse("`id2label` must name classes 0 .. 9, got 10", id2label={10: "cat"})
    refuse("`id2label` must name classes 0 .. 9, got 'cat'", id2label={"cat": "3"})


def test_a_failed_conversion_keeps_the_old_folder(tmp_path):
    path, out = official_file(tmp_path), tmp_path / "out"
    convert_official_dit(path, out, num_heads=3)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="`checkpoint` must be a whole file"):
        convert_official_dit(path, out, num_heads=3)
    assert isinstance(load_pipeline(out).transformer, DiTTransformer2DModel)


@pytest.mark.parametrize("name", ["scheduler", "transformer", "vae"])
def test_a_pipeline_folder_that_lacks_a_component(tmp_path, name):
    tiny_pipeline(tiny_dit()).save_pretrained(tmp_path)
    for file in (tmp_path / name).iterdir():
        file.unlink()
    (tmp_path / name).rmdir()
    with pytest.raises(FileNotFoundError, match=f"`path` must have a folder .* none for {name}"):
        load_pipeline(tmp_path)


def test_the_command(tmp_path, vae, capsys):
    path, out = official_file(tmp_path, args=None), tmp_path / "out"
    words = [str(path), str(out), "--from", "dit", "--num-heads", "3", "--vae", str(vae)]
    student = ["--to", "lit", "--inherit", "with_v", "--num-linear-heads", "2", "--img-size", "16"]
    assert convert.main([*words, *student]) == 0
    printed = capsys.readouterr().out
    assert LICENCE_NOTE in printed
    assert "entry ema of official.pt" in printed
    assert load_pipeline(out).transformer.config.num_linear_heads == 2
    assert convert.main([*words, "--model", "DiT-XL/2"]) == 2
    assert "error: `model` must be that of the checkpoint" in capsys.readouterr().err
    for words, message in (
        (["clear", "--to", "lit"], "`--to` must not be given for --from clear, got lit"),
        (["slab", "--num-heads", "3"], "`--num-heads` must not be given for --from slab, got 3"),
        (["dit", "--base", "x"], "`--base` must not be given for --from dit, got x"),
        (["clear", "--no-ema"], "`--no-ema` must not be given for --from clear, got True"),
    ):
        assert convert.main([str(path), str(out), "--from", *words]) == 2
        assert f"error: {message}" in capsys.readouterr().err


def test_classes_have_the_names_of_imagenet_unless_told_otherwise():
    names = read_labels(None, 1000)
    assert [names[label] for label in (0, 207, 999)] == [
        "tench",
        "golden retriever",
        "toilet tissue",
    ]
    assert list(names) == list(range(1000))
    assert read_labels({}, 1000) == read_labels(None, 10) == {}
    assert read_labels({"7": "seven"}, 1000) == {7: "seven"}


def test_recipes_name_every_policy():
    with pytest.raises(ValueError, match="`model.inherit` must name a policy, got 'with_k'"):
        ModelConfig(inherit="with_k", pretrained_teacher_model="x")
    assert ModelConfig(inherit="with_kv", pretrained_teacher_model="x").inherit == "with_kv"
