"""Saved pipelines that hold our models: they open again, the same, or say why not."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from diffusers import DiTPipeline

from lintra.diffusion import (
    LiTTransformer2DModel,
    PixelAutoencoder,
    assert_linear,
    load_pipeline,
    load_transformer,
    swap_transformer,
)
from lintra.diffusion.io import save_pipeline
from lintra.diffusion.sampling import sample_images
from lintra.diffusion.training.assemble import build_models
from tiny_models import pixel_pipeline, tiny_dit, tiny_lit, tiny_pipeline
from tiny_pixart import sigma_pipeline, tiny_pixart
from tiny_recipes import distillation_recipe

REOPEN = """
import sys, torch
from lintra.diffusion import load_pipeline
from lintra.diffusion.sampling import sample_images
torch.set_num_threads(1)
pipeline = load_pipeline(sys.argv[1])
images = sample_images(pipeline, [1, 2], num_inference_steps=2, guidance_scale=2.0)
torch.save((type(pipeline.transformer).__name__, pipeline.labels, images), sys.argv[2])
"""


def test_a_saved_pipeline_gives_the_same_images_in_a_fresh_process(tmp_path):
    pipeline = swap_transformer(tiny_pipeline(tiny_dit()), tiny_lit())
    pipeline.register_to_config(id2label={1: "cat", 2: "dog"})
    save_pipeline(pipeline, tmp_path / "saved")
    images = sample_images(pipeline, [1, 2], num_inference_steps=2, guidance_scale=2.0)
    result = tmp_path / "result.pt"
    subprocess.run([sys.executable, "-c", REOPEN, tmp_path / "saved", result], check=True)
    name, labels, again = torch.load(result)
    assert name == "LiTTransformer2DModel"
    assert labels == {"cat": 1, "dog": 2}
    assert torch.equal(again, images)


def test_swap_moves_and_registers():
    pipeline = tiny_pipeline(tiny_dit().to(torch.bfloat16))
    lit = tiny_lit()
    assert swap_transformer(pipeline, lit) is pipeline
    assert pipeline.transformer is lit
    assert lit.dtype == torch.bfloat16
    assert pipeline.config["transformer"][1] == "LiTTransformer2DModel"


def test_swap_errors():
    with pytest.raises(ValueError, match="`transformer` must fit .* in_channels 3 != 4"):
        swap_transformer(tiny_pipeline(tiny_dit()), tiny_lit(in_channels=3))
    with pytest.raises(ValueError, match="`pipeline` must have a transformer, got a Namespace"):
        swap_transformer(Namespace(), tiny_lit())


def test_pixel_space_pipeline(tmp_path):
    lit = tiny_lit(in_channels=1, out_channels=2)
    pixel_pipeline(lit).save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path)
    assert isinstance(pipeline.vae, PixelAutoencoder)
    images = sample_images(pipeline, [0, 5, 9], num_inference_steps=2, batch_size=2)
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.uint8
    one = sample_images(pipeline, [9], num_inference_steps=2, seed=2)
    assert torch.equal(one[0], images[2])  # the noise of an image depends on its number alone
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(pipeline.vae.encode(x).latent_dist.sample(), x)
    assert torch.equal(pipeline.vae(x).sample, x.expand(-1, 3, -1, -1))


def test_a_lit_does_not_open_as_a_dit(tmp_path):
    tiny_pipeline(tiny_lit()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "DiTTransformer2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    DiTPipeline.from_pretrained(tmp_path)  # what diffusers itself lets pass
    with pytest.raises(ValueError, match="`path` must name the class .* got DiTTransformer2DModel"):
        load_pipeline(tmp_path)
    assert isinstance(load_transformer(tmp_path), LiTTransformer2DModel)
    assert isinstance(load_transformer(tmp_path / "transformer"), LiTTransformer2DModel)


def test_load_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` must be a pipeline folder"):
        load_pipeline(tmp_path)
    with pytest.raises(FileNotFoundError, match="`path` must be a transformer folder"):
        load_transformer(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="`path` must hold one of DiT.*, got 'UNet2DModel'"):
        load_transformer(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="`path` must hold valid JSON in .*model_index"):
        load_pipeline(tmp_path)


def test_saving_again_replaces_the_folder(tmp_path):
    for seed in range(2):
        save_pipeline(tiny_pipeline(tiny_lit(num_layers=1 + seed)), tmp_path / "saved")
    assert load_pipeline(tmp_path / "saved").transformer.config.num_layers == 2
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_assert_linear():
    lit = tiny_lit()
    assert_linear(lit)
    dit = tiny_dit()
    with pytest.raises(
        ValueError, match="got 2 of 2 layers that do not: transformer_blocks.0.attn1"
    ):
        assert_linear(dit)
    lit.transformer_blocks[1].attn1 = dit.transformer_blocks[1].attn1
    with pytest.raises(
        ValueError, match="got 1 of 2 .* transformer_blocks.1.attn1: it is Attention"
    ):
        assert_linear(lit)
    lit = tiny_lit()
    lit.transformer_blocks[0].attn1.processor = object()
    with pytest.raises(ValueError, match="transformer_blocks.0.attn1: its processor is object"):
        assert_linear(lit)
    with pytest.raises(ValueError, match="`model` must have attention layers, got a Linear"):
        assert_linear(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("channels", [1, 3, 4, 12, 48])
def test_squares_of_pixels_are_channels(channels):
    vae = PixelAutoencoder.of_latents(channels)
    patch, own = vae.patch_size, vae.config.in_channels
    assert channels == own * patch**2
    images = torch.rand(2, own, 4 * patch, 8 * patch)
    latents = vae.encode(images).latent_dist.mean
    assert latents.shape == (2, channels, 4, 8)
    assert torch.equal(latents[:, 0], images[:, 0, ::patch, ::patch])
    assert torch.equal(vae.decode(latents).sample, images.expand(-1, 3, -1, -1))


def test_pixel_autoencoder_errors():
    with pytest.raises(ValueError, match="`block_out_channels` must be ones, got \\(1, 2\\)"):
        PixelAutoencoder(block_out_channels=(1, 2))
    with pytest.raises(ValueError, match="`channels` must be 1 or 3 times a power of 4, got 24"):
        PixelAutoencoder.of_latents(24)
    with pytest.raises(ValueError, match="`in_channels` must be 1 or 3, got 4"):
        PixelAutoencoder(in_channels=4)
    with pytest.raises(ValueError, match=r"`scaling_factor` must be 1.0, got 0.5"):
        PixelAutoencoder(scaling_factor=0.5)


def test_sampling_errors():
    pipeline = pixel_pipeline(tiny_lit(in_channels=1, out_channels=2, num_embeds_ada_norm=10))
    with pytest.raises(ValueError, match=r"`labels` must be in 0 .. 9, got 10"):
        sample_images(pipeline, [3, 10], num_inference_steps=2)
    with pytest.raises(ValueError, match="`guidance_scale` must be at most 1 for .* 10 classes"):
        sample_images(pipeline, [3], num_inference_steps=2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="`scheduler` must be one of ddim, .* got 'euler'"):
        sample_images(pipeline, [3], num_inference_steps=2, scheduler="euler")


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver"])
def test_other_schedulers(scheduler):
    pipeline = pixel_pipeline(tiny_lit(in_channels=1, out_channels=2))
    images = sample_images(pipeline, [3], num_inference_steps=3, scheduler=scheduler)
    assert images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("is_empty", [False, True], ids=["no folder", "empty folder"])
def test_a_pixart_folder_without_a_transformer(tmp_path, is_empty):
    sigma_pipeline(tiny_pixart()).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "transformer")
    with pytest.raises(FileNotFoundError, match="must have a folder transformer, got a pipeline"):
        load_transformer(tmp_path)
    if is_empty:
        (tmp_path / "transformer").mkdir()
    with pytest.raises(FileNotFoundError, match="`path` must have a folder .* none for transfor"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("part", ["scheduler", "transformer"])
def test_a_teacher_that_was_saved_without_a_part(tmp_path, part):
    pixel_pipeline(tiny_dit(in_channels=1, out_channels=2)).save_pretrained(tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher" / part)
    recipe = distillation_recipe(tmp_path / "run", tmp_path / "teacher")
    with pytest.raises(FileNotFoundError, match=f"`path` must have a folder .* none for {part}"):
        build_models(recipe, ["a"])
    file = tmp_path / "teacher" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: [None, None]}))
    with pytest.raises(
        ValueError, match=f"model.pretrained_teacher_model` must have a {part}, got"
    ):
        build_models(recipe, ["a"])
    assert not (tmp_path / "run").exists()
