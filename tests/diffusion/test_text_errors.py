"""Text-to-image recipes, teachers and caches that do not fit each other: one clear error each."""

import sys
from dataclasses import replace

import pytest
import torch

from lintra.diffusion.training.loop import Trainer
from lintra.diffusion.training.trainable import choose_trainable
from tiny_clear import tiny_clear
from tiny_models import pixel_pipeline, tiny_dit
from tiny_recipes import digits_recipe, text_recipe
from tiny_text import make_places, tiny_text_pipeline


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("places"), "flux", "sd3", "pixart")


@pytest.fixture
def recipe(places, tmp_path):
    def make(family, **groups):
        return text_recipe(tmp_path / "never", family, *places[family], **groups)

    yield make
    assert not (tmp_path / "never").exists()


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
    pipeline = tiny_text_pipeline("flux")
    pipeline.register_modules(vae=None)
    pipeline.save_pretrained(tmp_path / "no_vae")
    fails(
        recipe("flux", model={"pretrained_teacher_model": str(tmp_path / "no_vae")}),
        "`model.vae` must be given for a teacher without an autoencoder, got None",
    )


def test_no_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    options = {"dtype": torch.float32, "rank": 2, "lora_alpha": None}
    with pytest.raises(ValueError, match="must not be lora where peft is not installed"):
        choose_trainable(tiny_clear("flux"), "lora", **options)
