"""`lintra distill`, `train`, `sample` and `demo` as a person calls them."""

import json
from dataclasses import asdict

import pytest
from PIL import Image

from lintra.tools import demo, distill, sample, train
from tiny_models import pixel_pipeline, tiny_lit, tiny_pipeline
from tiny_recipes import digits_recipe


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(asdict(digits_recipe(folder / "run"))))  # JSON is YAML
    return file


@pytest.fixture(scope="module")
def teacher(recipe_file):
    """Pipeline folder that `lintra train` made."""
    assert train.main([f"--config={recipe_file}", "--training.max_train_steps=2"]) == 0
    return recipe_file.parent / "run" / "pipeline"


def distill_words(recipe_file, teacher, tmp_path):
    words = [f"--config={recipe_file}", "--model.kind=lit", "--model.config={}"]
    words += [f"--model.pretrained_teacher_model={teacher}", f"--output_dir={tmp_path}"]
    return [*words, "--training.max_train_steps=2", "--loss.noise_distillation=0.5"]


def test_distill(recipe_file, teacher, tmp_path, capsys):
    assert distill.main(distill_words(recipe_file, teacher, tmp_path)) == 0
    assert f"2 steps done; pipeline: {tmp_path / 'pipeline'}" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "pipeline" / "recipe.json").read_text())
    assert recipe["loss"]["noise_distillation"] == 0.5
    assert recipe["training"]["max_train_steps"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.lr=1e-3"], "unrecognized arguments: --training.lr=1e-3"),
        (["--training.learning_rate=fast"], 'Parser key "training.learning_rate"'),
        (["--training.learning_rate=-1"], "`training.learning_rate` must be positive, got -1.0"),
        (["--training.max_train_steps=-1"], "`training.max_train_steps` must not be negative, got"),
        (["--training.class_dropout_prob=1"], "`training.class_dropout_prob` must be in [0, 1)"),
        (["--model.kind=unet"], 'Parser key "model.kind"'),
        (["--model.config={}"], "`model.config` must be given without a teacher, got {}"),
        (["--data.source=imagefolder"], "`data.path` must be given for imagefolder, got None"),
        (["--data.path=/nowhere"], "`data.path` must exist, got '/nowhere'"),
        (["--model.vae=/nowhere"], "`model.vae` must exist, got '/nowhere'"),
        (["--data.channels=2"], "`data.channels` must be 1 or 3, got 2"),
        (["--loss.sharpness=1"], "`loss` must name terms of noise, vlb"),
        (["--loss.noise_distillation=1"], "`loss.noise_distillation` must be 0 without a teacher"),
        (["--ema.ema_decay=1"], "`ema.ema_decay` must be in (0, 1), got 1.0"),
        (["--config=/nowhere.yaml"], "/nowhere.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_recipe_is_one_clear_error(recipe_file, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([f"--config={recipe_file}", *words])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("error:") == 1
    assert "Traceback" not in errors


def test_an_unknown_key_in_the_file(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    recipe = asdict(digits_recipe(tmp_path))
    recipe["training"]["batch_size"] = 3
    file.write_text(json.dumps(recipe))
    with pytest.raises(SystemExit):
        train.main([f"--config={file}"])
    assert "does not accept option 'batch_size'" in capsys.readouterr().err


def test_what_only_shows_when_opened_is_also_one_error(recipe_file, tmp_path, capsys):
    assert train.main([f"--config={recipe_file}", "--data.resolution=9"]) == 2
    assert "error: `data.resolution` must be 8" in capsys.readouterr().err
    words = distill_words(recipe_file, tmp_path, tmp_path / "run")  # no pipeline there
    assert distill.main(words) == 2
    assert "error: `path` must be a pipeline folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_train_and_distill_are_not_mixed_up(recipe_file, teacher, capsys):
    assert distill.main([f"--config={recipe_file}"]) == 2
    assert "must be a pipeline folder, got none" in capsys.readouterr().err
    words = [f"--config={recipe_file}", f"--model.pretrained_teacher_model={teacher}"]
    assert train.main(words) == 2
    assert "`model.pretrained_teacher_model` must be none" in capsys.readouterr().err


def test_sample(tmp_path, capsys):
    pixel_pipeline(tiny_lit(in_channels=1, out_channels=2)).save_pretrained(tmp_path / "lit")
    output = tmp_path / "grid.png"
    words = [str(tmp_path / "lit"), f"--output={output}", "--num_inference_steps=2"]
    words += ["--guidance_scale=1.5", "--labels=[3, 3, 5]", "--dtype=bf16", "--device=cpu"]
    assert sample.main(words) == 0
    assert f"3 images of 8 px: {output}" in capsys.readouterr().out
    with Image.open(output) as image:
        assert image.width > 3 * 64


def test_sample_errors(tmp_path, capsys):
    assert sample.main([str(tmp_path)]) == 2
    assert "error: `path` must be a pipeline folder" in capsys.readouterr().err
    tiny_pipeline(tiny_lit(num_embeds_ada_norm=4)).save_pretrained(tmp_path)
    assert sample.main([str(tmp_path), "--labels=[4]", "--device=cpu"]) == 2
    assert "error: `labels` must be in 0 .. 3, got 4" in capsys.readouterr().err
    for name in ("num_inference_steps", "guidance_scale"):
        assert sample.main([str(tmp_path), f"--{name}", "2", "3", "--device=cpu"]) == 2
        message = f"error: `{name}` must be one value without --stages, got 2"
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sample.main([str(tmp_path), "--dtype=int8"])
    assert "`dtype` must be one of fp32, bf16, fp16, got 'int8'" in capsys.readouterr().err


def test_the_demo_reuses_its_teacher_and_changes_one_thing(tmp_path, capsys):
    words = ["--short", f"--output_dir={tmp_path}"]
    assert demo.main(words) == 0
    table = (tmp_path / "short" / "table.md").read_text()
    assert capsys.readouterr().out.count(table.strip())
    rows = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert rows == ["DiT teacher", "LiT distilled", "LiT inherited", "LiT from scratch"]
    for picture in ("samples.png", "loss.png"):
        with Image.open(tmp_path / "short" / picture) as image:
            assert image.width > 400
    recipes = {
        name: json.loads((tmp_path / "short" / name / "pipeline" / "recipe.json").read_text())
        for name in ("distilled", "inherited", "scratch")
    }
    for recipe in recipes.values():
        del recipe["output_dir"]
    assert recipes["scratch"]["model"].pop("inherit") == "none"
    assert recipes["inherited"]["model"].pop("inherit") == "all_but_attention"
    assert recipes["scratch"] == recipes["inherited"]
    assert recipes["inherited"]["loss"] == {"noise": 1.0, "vlb": 1.0}
    assert demo.main(words) == 0
    assert "teacher: taken from an earlier run" in capsys.readouterr().out
