"""Every text-to-image recipe parses, has the numbers of its paper, and trains when it is tiny."""

from pathlib import Path

import pytest

import lintra.configs
from lintra.diffusion import assert_linear, load_pipeline
from lintra.diffusion.training.config import parse_recipe
from lintra.tools import distill
from tiny_text import make_tiny_cache, tiny_text_pipeline

FOLDER = Path(lintra.configs.__file__).parent / "diffusion"
# Those of studies are in test_studies.py.
RECIPES = sorted(
    p.stem
    for p in FOLDER.glob("*.yaml")
    if "prompt_cache" in p.read_text() and not p.stem.startswith("imagenette64")
)
CLEAR_LOSS = {"flow": 1.0, "output_distillation": 0.5, "attention_distillation": 0.05}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Teacher and cache of each family, made when first asked for."""
    found = {}

    def place(family):
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            tiny_text_pipeline(family).save_pretrained(folder / "pipeline")
            cache = make_tiny_cache(folder / "cache", folder / "pipeline")
            found[family] = folder / "pipeline", cache
        return found[family]

    return place


def parsed(name, tmp_path, *more):
    words = [f"--config={FOLDER / name}.yaml", f"--model.pretrained_teacher_model={tmp_path}"]
    return parse_recipe([*words, f"--data.path={tmp_path}", *more], "test", "")


@pytest.mark.parametrize("name", RECIPES)
def test_names_and_numbers(name, tmp_path):
    recipe = parsed(name, tmp_path)
    assert recipe.output_dir == f"runs/{name}"
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"configs/diffusion/{name}.yaml" in text
    training = recipe.training
    if not recipe.model.is_clear:
        assert recipe.loss["noise_distillation"] == 1.0
        assert recipe.loss["variance_distillation"] == 0.05
        assert recipe.model.inherit == "with_out"
        total = 8 * training.train_batch_size
        assert total == (384 if name.endswith("512") else 96)
        assert training.learning_rate == pytest.approx(2e-5 * (total / 256) ** 0.5, rel=0.01)
        assert (training.optimizer, training.max_grad_norm) == ("came", 0.01)
        return
    assert f"_r{recipe.model.config['radius']}" in name
    processes = 1 if recipe.model.trainable == "lora" else 4
    if "transfer" not in name:
        assert recipe.loss == CLEAR_LOSS
        batch = training.train_batch_size * training.gradient_accumulation_steps
        assert processes * batch == 32
        assert training.max_train_steps == 10_000
    if recipe.model.trainable == "clear" and "transfer" not in name:
        assert (training.optimizer, training.learning_rate) == ("prodigy", 1.0)
        assert training.adam_weight_decay == 1e-4
    if name.startswith("flux"):
        assert (recipe.flow.weighting_scheme, recipe.flow.guidance_scale) == ("none", 3.5)


SMALL = [
    "--training.max_train_steps=2",
    "--training.train_batch_size=2",
    "--training.gradient_accumulation_steps=1",
    "--training.optimizer=adamw",
    "--training.learning_rate=1e-3",
    "--training.mixed_precision=no",
    "--data.dataloader_num_workers=0",
    "--validation.num_validation_images=1",
    "--validation.num_inference_steps=2",
    "--logging.report_to=null",
    "--logging.logging_steps=1",
]


@pytest.mark.parametrize("name", [name for name in RECIPES if name[-2:] not in ("r8", "32")])
def test_a_tiny_one_trains(name, places, tmp_path, capsys):
    family = "pixart" if "pixart" in name else name.split("_")[0]
    teacher, cache = places(family)
    words = [f"--config={FOLDER / name}.yaml", *SMALL, f"--output_dir={tmp_path / 'run'}"]
    words += [f"--model.pretrained_teacher_model={teacher}", f"--data.path={cache}"]
    if family != "pixart":
        words += ["--model.config.radius=2", "--model.rank=2"]
    assert distill.main(words) == 0
    assert "2 steps done" in capsys.readouterr().out
    pipeline = load_pipeline(tmp_path / "run" / "pipeline")
    assert_linear(pipeline.transformer)
    assert (tmp_path / "run" / "samples" / "final.png").is_file()


def test_what_is_missing_is_one_clear_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_recipe([f"--config={FOLDER / 'flux_clear_r8.yaml'}"], "test", "")
    assert "must be 0 without a teacher" in capsys.readouterr().err
    words = [f"--config={FOLDER / 'flux_clear_r8.yaml'}"]
    words.append(f"--model.pretrained_teacher_model={tmp_path}")
    with pytest.raises(SystemExit):
        parse_recipe(words, "test", "")
    assert "`data.path` must be given for prompt_cache, got None" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("flux_clear_r8", tmp_path, "--data.proportion_empty_prompts=1")
    assert "`data.proportion_empty_prompts` must be in [0, 1)" in capsys.readouterr().err
    for option in ("--flow.shift=0", "--flow.logit_std=0", "--model.rank=0"):
        with pytest.raises(SystemExit):
            parsed("flux_clear_r8", tmp_path, option)
        field = option.removeprefix("--").removesuffix("=0")
        assert f"`{field}` must be positive, got 0" in capsys.readouterr().err
