"""Every recipe parses, names what exists, and carries the numbers of its paper."""

from pathlib import Path

import pytest
import torch
import yaml

import lintra.configs
from lintra.diffusion import LiTTransformer2DModel
from lintra.diffusion.inheritance import POLICIES
from lintra.diffusion.losses import check_loss_weights
from lintra.diffusion.models.linear_blocks import default_num_linear_heads
from lintra.diffusion.training.config import parse_recipe

FOLDER = Path(lintra.configs.__file__).parent
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
DEFAULT = "all_but_attention"
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


ABLATIONS = {
    "heads": ["--model.config.num_linear_heads=6"],
    "kernel": ["--model.config.linear_feature_map=elu1"],
    "no convolution": ["--model.config.conv_kernel_size=0"],
    "no distillation": ["--loss.noise_distillation=0", "--loss.variance_distillation=0"],
    **{policy: [f"--model.inherit={policy}"] for policy in ("none", *POLICIES)},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_of_the_paper_are_overrides(name, tmp_path):
    paths = [f"--model.pretrained_teacher_model={tmp_path}", f"--data.path={tmp_path}"]
    recipe = f"--config={FOLDER / 'lit_s_2_imagenet256.yaml'}"
    options = parse_recipe([recipe, *paths, *ABLATIONS[name]], "test", "")
    with torch.device("meta"):
        model = LiTTransformer2DModel(num_attention_heads=6, num_layers=1, **options.model.config)
    attention = model.transformer_blocks[0].attn1
    assert attention.heads == (6 if name == "heads" else 2)
    assert attention.feature_map == ("elu1" if name == "kernel" else "relu")
    assert (attention.dwc is None) == (name == "no convolution")
    assert options.model.inherit == (name if name in POLICIES or name == "none" else DEFAULT)
    assert (options.loss["noise_distillation"] == 0) == (name == "no distillation")


def test_an_unknown_policy_is_one_clear_line(tmp_path, capsys):
    recipe = f"--config={FOLDER / 'lit_s_2_imagenet256.yaml'}"
    with pytest.raises(SystemExit):
        parse_recipe([recipe, f"--data.path={tmp_path}", "--model.inherit=with_k"], "test", "")
    assert "`model.inherit` must name a policy, got 'with_k'" in capsys.readouterr().err
