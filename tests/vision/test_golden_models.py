"""Whole official models at full size: logits, features and stages, before and after folding."""

import zlib

import pytest
import timm
import torch
from torch import Tensor, nn

from golden.golden_fill_vision import image, state_dict
from golden_vision import load_vision, relative_error
from lintra.vision import PRepBN, RepBN, fold_norms, load_official

TOLERANCE = 5e-6  # float32 noise of the official models is 1e-6

CASES = {
    "deit_t_prepbn": "deit_tiny_prepbn_patch16_224",
    "slab_deit_t": "deit_tiny_slab_patch16_224",
    "slab_swin_t": "swin_tiny_slab_patch4_window56_224",
    "inline_swin_t": "swin_tiny_inline_patch4_window56_224",
    "inline_cswin_tiny": "cswin_tiny_inline_224",
    "inline_deit_tiny": "deit_tiny_inline_patch16_224",
    "pvt_t_prepbn": "pvt_tiny_prepbn",
}


def check_outputs(model: nn.Module, x: Tensor, case: dict[str, Tensor]) -> None:
    tokens = model.forward_features(x)
    assert relative_error(model.forward_head(tokens), case["logits64"]) < TOLERANCE
    features = model.forward_head(tokens, pre_logits=True)
    assert relative_error(features, case["features64"]) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_official(name: str) -> None:
    description, case = load_vision(name)
    state = state_dict(description["layout"], case)
    crc = 0
    for value in state.values():
        crc = zlib.crc32(value.numpy().tobytes(), crc)
    assert crc == description["checks"]["weights_crc32"]
    x = image(description["config"]["img_size"])
    assert zlib.crc32(x.numpy().tobytes()) == description["checks"]["input_crc32"]

    model = timm.create_model(CASES[name]).eval()
    report = load_official(model, state)
    assert report.untouched == []
    assert report.resized == []
    check_outputs(model, x, case)
    indices = [2, 5, 8, 11] if "deit" in name else None
    stages = model.forward_intermediates(x, indices, intermediates_only=True)
    for number, stage in enumerate(stages, start=1):
        if "deit" in name:  # patch tokens only; statistics of a case count the class token too
            expected = case[f"stage{number}/map"].flatten()[-stage.shape[2] * stage.shape[3] :]
            assert relative_error(stage[0].mean(0).flatten(), expected) < TOLERANCE
        else:
            expected = case[f"stage{number}/mean"].flatten()
            assert relative_error(stage.mean((0, 2, 3)), expected) < TOLERANCE
    fold_norms(model)
    assert not any(isinstance(module, (PRepBN, RepBN)) for module in model.modules())
    check_outputs(model, x, case)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)))
