"""Studies and their recipes parse, and are what the issue asks for."""

from dataclasses import replace
from pathlib import Path

import pytest

import lintra.configs
from lintra.diffusion.losses import check_loss_weights
from lintra.diffusion.study.config import TEACHER, Study, check_study, parse_study
from lintra.diffusion.training.config import ModelConfig, parse_recipe

FOLDER = Path(lintra.configs.__file__).parent / "diffusion"
STUDIES = sorted(path.name for path in FOLDER.glob("*.yaml") if "arms:" in path.read_text())
FILES = {"teacher": "teacher", "student": "lit"}
CLEAR_FILES = {"teacher": "flux_teacher", "student": "clear"}
PRETRAINED = ("pretrained_teacher_model", "pretrained_donor_model")
DISTILLING = ("noise_distillation", "variance_distillation")


def files(name: str) -> dict[str, str]:
    return CLEAR_FILES if "clear" in name else FILES


def parse(name: str, folder: Path, *words: str) -> Study:
    named = files(name).items()
    recipes = [f"--{part}={FOLDER / f'imagenette64_{file}.yaml'}" for part, file in named]
    weights = folder / "weights.pth"
    weights.touch()
    paths = [f"--data_path={weights}", f"--evaluation.weights={weights}", f"--output_dir={folder}"]
    return parse_study([f"--config={FOLDER / name}", *recipes, *paths, *words], "test", "")


@pytest.mark.parametrize("name", STUDIES)
def test_parses(name: str, tmp_path: Path) -> None:
    study = parse(name, tmp_path)
    check_study(study)
    # The files name each other from the root of the repository, where the command is given.
    text = (FOLDER / name).read_text()
    named = files(name).values()
    assert all(f"configs/diffusion/imagenette64_{file}.yaml" in text for file in named)


def test_the_arms_of_the_study(tmp_path: Path) -> None:
    study = parse("imagenette64_study.yaml", tmp_path)
    for step in (study.steps(TEACHER)[0], *(study.donor_step(arm) for arm in study.arms)):
        study.pipeline(TEACHER, step).mkdir(parents=True, exist_ok=True)
    recipes = {arm: study.recipe(arm) for arm in study.arms}
    distilled = {arm: [r.loss[term] > 0 for term in DISTILLING] for arm, r in recipes.items()}
    assert distilled == {
        "scratch": [False, False],
        "inherited": [False, False],
        "noise": [True, False],
        "hybrid": [True, True],
        "with_qkv": [True, True],
        "donor_heads": [True, True],
        "no_convolution": [True, True],
        "softmax": [False, False],
    }
    inherited = {arm: recipe.model.inherit for arm, recipe in recipes.items()}
    assert inherited.pop("scratch") == "none"
    assert inherited.pop("with_qkv") == "with_qkv"
    assert inherited.pop("softmax") == "all"
    assert set(inherited.values()) == {"all_but_attention"}
    assert recipes["softmax"].model.kind == "dit"
    assert recipes["donor_heads"].model.config == {"num_linear_heads": 4}
    assert recipes["no_convolution"].model.config == {"conv_kernel_size": 0}
    # Equal steps, and all else alike.
    assert {study.steps(arm)[0] for arm in study.arms} == {2400}
    same = {
        str(replace(r.training, max_train_steps=1)) + str(r.data) + str(r.ema)
        for r in recipes.values()
    }
    assert len(same) == 1


def test_the_ablations_share_the_folder_and_the_teacher(tmp_path: Path) -> None:
    study, more = (parse(f"imagenette64_{n}.yaml", tmp_path) for n in ("study", "ablations"))
    assert study.recipe(TEACHER) == more.recipe(TEACHER)
    assert study.recipe(TEACHER).checkpoint.pipeline_steps == [3000, 6000]
    assert not set(study.arms) & set(more.arms)
    assert [folder.name for folder in more.needs("donor_quarter")] == ["pipeline-3000", "pipeline"]


def test_the_small_teacher(tmp_path: Path) -> None:
    config = parse("imagenette64_small_study.yaml", tmp_path).recipe(TEACHER).model.config
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (3, 32)


def test_the_arms_of_the_clear_study(tmp_path: Path) -> None:
    study = parse("imagenette64_clear_study.yaml", tmp_path)
    for folder in (study.pipeline(TEACHER, study.steps(TEACHER)[0]), study.cache):
        folder.mkdir(parents=True)
    recipes = {arm: study.recipe(arm) for arm in study.arms}
    terms = ("flow", "output_distillation", "attention_distillation")
    assert {arm: [r.loss[term] for term in terms] for arm, r in list(recipes.items())[1:4]} == {
        "flow": [1.0, 0.0, 0.0],
        "output": [1.0, 0.5, 0.0],
        "attention": [1.0, 0.5, 0.05],
    }
    radii = {arm: recipe.model.config["radius"] for arm, recipe in recipes.items()}
    assert radii["r2_linearised"] == radii["r2"] == 2
    assert radii["r4_linearised"] == radii["r4"] == 4
    assert {radii[arm] for arm in ("linearised", "flow", "output", "attention", "lora")} == {3}
    steps = {arm: study.steps(arm) for arm in study.arms}
    untrained = {arm for arm in steps if steps[arm] == [0]}
    assert untrained == {"whole", *(arm for arm in steps if "linearised" in arm)}
    assert {str(steps[arm]) for arm in steps.keys() - untrained} == {"[1000]"}
    assert radii["whole"] ** 2 > 2 * 15**2
    # The grid of the teacher: 64 pixels, 2 to a latent, 2 latents to a token.
    teacher = study.recipe(TEACHER)
    assert teacher.model.config["in_channels"] == 3 * 4 * 4
    assert sum(teacher.model.config["axes_dims_rope"]) == 64
    assert teacher.data.in_memory
    doubles, singles = (teacher.model.config[f"num_{kind}layers"] for kind in ("", "single_"))
    layers = [*range(doubles, doubles + singles)]
    assert all(recipe.model.attention_layers == layers for recipe in recipes.values())
    assert recipes["lora"].model.learns == "lora"


def test_going_on_at_512_pixels(tmp_path: Path) -> None:
    file = FOLDER / "lit_xl_2_imagenet512_from_256.yaml"
    words = [f"--model.{part}={tmp_path}" for part in PRETRAINED] + [f"--data.path={tmp_path}"]
    recipe = parse_recipe([f"--config={file}", *words], "test", "")
    assert recipe.model.inherit == "all"
    assert recipe.model.config == {"sample_size": 64, "interpolation_scale": 2.0}
    check_loss_weights(recipe.loss, has_teacher=True, has_variance=True)
    with pytest.raises(
        ValueError, match="`model.inherit` must not be all without a donor, got 'al"
    ):
        ModelConfig(inherit="all", config={"sample_size": 64})
