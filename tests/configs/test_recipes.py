"""Every recipe parses, names what exists, and carries the numbers of its paper."""

from pathlib import Path

import pytest
import yaml

import lintra.configs
from lintra.diffusion.losses import check_loss_weights
from lintra.diffusion.models.linear_blocks import default_num_linear_heads
from lintra.diffusion.training.config import parse_recipe

FOLDER = Path(lintra.configs.__file__).parent
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
WIDTHS = {"s": 384, "b": 768, "l": 1024, "xl": 1152}


@pytest.mark.parametrize("name", RECIPES)
def test_parses(name, tmp_path):
    overrides = [f"--output_dir={tmp_path}"]
    if "quickstart_digits_teacher" not in name:
        overrides.append(f"--model.pretrained_teacher_model={tmp_path}")
    if "imagenet" in name:
        overrides.append(f"--data.path={tmp_path}")
    recipe = parse_recipe([f"--config={FOLDER / name}", *overrides], "test", "")
    check_loss_weights(recipe.loss, has_teacher=True, has_variance=True)


@pytest.mark.parametrize("name", [name for name in RECIPES if "imagenet" in name])
def test_numbers_of_the_paper(name):
    recipe = yaml.safe_load((FOLDER / name).read_text())
    size = name.split("_")[1]
    heads = recipe["model"]["config"]["num_linear_heads"]
    assert heads == default_num_linear_heads(WIDTHS[size])
    assert recipe["loss"]["noise_distillation"] == 0.5
    assert recipe["loss"]["variance_distillation"] == 0.05
    assert recipe["model"]["inherit"] == "all_but_attention"
    assert 8 * recipe["training"]["train_batch_size"] == (128 if "512" in name else 256)
    assert recipe["training"]["max_train_steps"] == (
        700_000 if "512" in name else 1_400_000 if size == "xl" else 100_000
    )
