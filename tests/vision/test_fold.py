"""Folding: exact for every family, option and map, refused where it cannot be."""

import copy

import pytest
import timm
import torch
from timm.models import reparameterize_model
from torch import nn

from golden_vision import group, load_vision, relative_error
from lintra.vision import PRepBN, RepBN, fold_norms
from lintra.vision.fold import ChannelAffine, NormSite, fold_into_reader, fold_into_writer
from lintra.vision.models.options import NORMS
from lintra.vision.models.swin_block import LinearSwinBlock
from lintra.vision.norm import norm_factory
from vision_names import NAMES, create_small

TOLERANCE = 1e-5


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Trained-looking weights: no zeros, no ones, some negative gains; statistics measured."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.add_(0.3 * torch.randn_like(parameter))
        if name.endswith("positional_encoding"):
            parameter.normal_(std=0.02)
    return model


@torch.no_grad()
def calibrate(model: nn.Module, x: torch.Tensor) -> nn.Module:
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 1.0
            module.train()
    model(x)
    return model.eval()


def is_norm_left(model: nn.Module) -> bool:
    return any(isinstance(module, (PRepBN, RepBN)) for module in model.modules())


def random_norm(channels: int, name: str = "prepbn") -> nn.Module:
    norm = randomize(norm_factory(name, 1e-6)(channels))
    return calibrate(norm, torch.randn(64, channels) + 1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_outputs_stay(name: str) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = calibrate(randomize(create_small(name, norm="prepbn")), x)
    assert is_norm_left(model)
    logits = model(x)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    by_timm = reparameterize_model(model)
    assert fold_norms(model) is model
    for folded in (model, by_timm):
        assert not is_norm_left(folded)
        assert relative_error(folded(x), logits) < TOLERANCE
        again = folded.forward_head(folded.forward_features(x), pre_logits=True)
        assert relative_error(again, features) < TOLERANCE
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())


@pytest.mark.parametrize("size", [(60, 92), (68, 64)])
@pytest.mark.parametrize(
    "name",
    ["swin_tiny_prepbn_patch4_window7_224", "swin_base_inline_patch4_window56_224",
     "cswin_tiny_slab_224", "pvt_tiny_prepbn"],
)  # fmt: skip
@pytest.mark.parametrize("dynamic", [True, False])
@torch.no_grad()
def test_padded_and_odd_maps(name: str, size: tuple[int, int], dynamic: bool) -> None:
    options = {"img_size": size}
    if dynamic:
        options = {"dynamic_img_size": True} if "swin_" in name[:5] else {}
    x = torch.randn(2, 3, *size)
    model = calibrate(randomize(create_small(name, norm="repbn", **options)), x)
    expected = model(x)
    fold_norms(model)
    assert relative_error(model(x), expected) < TOLERANCE


@torch.no_grad()
def test_padded_windows_equal_timm_and_survive_a_round_trip() -> None:
    torch.manual_seed(1)
    options = {"img_size": 72, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **options).eval()
    ours = timm.create_model(
        "swin_tiny_prepbn_patch4_window7_224", num_classes=5, norm="ln", **options
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 72, 72)
    torch.testing.assert_close(ours(x), theirs(x))

    model = timm.create_model("swin_tiny_prepbn_patch4_window7_224", num_classes=5, **options)
    calibrate(randomize(model), x)
    expected = model(x)
    folded = fold_norms(copy.deepcopy(model))
    empty = fold_norms(
        timm.create_model("swin_tiny_prepbn_patch4_window7_224", num_classes=5, **options)
    ).eval()
    empty.load_state_dict(folded.state_dict())
    assert relative_error(empty(x), expected) < TOLERANCE
    folded.set_input_size(img_size=(80, 80))
    assert folded(torch.randn(1, 3, 80, 80)).shape == (1, 5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attn", ["softmax", "sla", "inline"])
@pytest.mark.parametrize(
    "name", ["deit_tiny_slab_patch16_224", "swin_tiny_slab_patch4_window56_224",
             "pvt_tiny_slab", "cswin_tiny_slab_224"],
)  # fmt: skip
@torch.no_grad()
def test_every_attention_with_every_norm(name: str, attn: str, norm: str) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = calibrate(randomize(create_small(name, attn=attn, norm=norm)), x)
    expected = model(x)
    fold_norms(model)
    assert not is_norm_left(model)
    assert relative_error(model(x), expected) < TOLERANCE


@torch.no_grad()
def test_mixed_norms_and_sla_reduction() -> None:
    model = create_small(
        "pvt_tiny_slab",
        norm=("ln", ("prepbn", "repbn"), "repbn", "ln"),
        linear_sr_ratios=(4, 2, 1, 1),
    )
    x = torch.randn(2, 3, 64, 64)
    calibrate(randomize(model), x)
    expected = model(x)
    fold_norms(model)
    assert sum(isinstance(module, nn.LayerNorm) for module in model.modules()) > 0
    assert relative_error(model(x), expected) < TOLERANCE


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", ""])
@torch.no_grad()
def test_final_norm_and_pooling(pool: str) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = create_small("deit_tiny_prepbn_patch16_224", global_pool=pool, fc_norm=False)
    calibrate(randomize(model), x)
    expected = model(x)
    fold_norms(model)
    assert relative_error(model(x), expected) < TOLERANCE
    model.reset_classifier(0)
    assert model(x).shape[-1] == 24


@pytest.mark.parametrize("name", ["deit_tiny_slab_patch16_224", "cswin_tiny_slab_224"])
@torch.no_grad()
def test_without_a_classifier_features_stay(name: str) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = calibrate(randomize(create_small(name, num_classes=0)), x)
    expected = model(x)
    assert relative_error(fold_norms(model)(x), expected) < TOLERANCE


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Linear(6, 4, bias=False),
        nn.Conv2d(6, 4, 2, stride=2),
        nn.Conv2d(6, 4, 3, groups=2, bias=False),
        nn.Conv1d(6, 9, 1, groups=3),
    ],
)
@torch.no_grad()
def test_forward_fold(layer: nn.Module) -> None:
    norm = random_norm(6)
    if isinstance(layer, nn.Linear):
        x = torch.randn(3, 5, 6)
        expected = layer(norm(x))
        fold_into_reader(*norm.affine(), layer)
        torch.testing.assert_close(layer(x), expected)
        return
    x = torch.randn(3, 6, *(7,) * (layer.weight.ndim - 2))
    expected = layer(norm(x.movedim(1, -1)).movedim(-1, 1))
    fold_into_reader(*norm.affine(), layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_backward_fold_keeps_the_skip_of_the_bias(bias: bool) -> None:
    norm = random_norm(6, "repbn")
    conv = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
    x = torch.randn(2, 3, 8, 8)
    expected = norm(conv(x).movedim(1, -1)).movedim(-1, 1)
    fold_into_writer(conv, *norm.affine())
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_zero_gain_folds() -> None:
    norm = random_norm(6, "repbn")
    norm.alpha.zero_()
    norm.bn.weight.zero_()
    layer = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    expected = layer(norm(x))
    fold_into_reader(*norm.affine(), layer)
    torch.testing.assert_close(layer(x), expected)


def test_refused_folds() -> None:
    scale, shift = torch.ones(6), torch.zeros(6)
    with pytest.raises(ValueError, match=r"`layer` must not pad .* got padding \(1, 1\)"):
        fold_into_reader(scale, shift, nn.Conv2d(6, 4, 3, padding=1))
    with pytest.raises(ValueError, match=r"`layer` must be a Linear or a convolution .* Embedding"):
        fold_into_writer(nn.Embedding(6, 6), scale, shift)
    model = nn.Sequential(nn.Linear(4, 6), RepBN(6), nn.GELU())
    with pytest.raises(ValueError, match=r"`model` must have a Linear .* stand alone: 1$"):
        fold_norms(model)
    assert isinstance(model[1], RepBN)
    model = nn.ModuleDict({"repbn": RepBN(6)})
    with pytest.raises(ValueError, match=r"stand alone: repbn$"):
        fold_norms(model)
    model = create_small("deit_tiny_prepbn_patch16_224", qk_norm=True)
    with pytest.raises(ValueError, match=r"stand alone: blocks.0.attn.q_norm"):
        fold_norms(model)


@torch.no_grad()
def test_lone_norms_become_affine_through_timm() -> None:
    model = nn.Sequential(nn.Linear(4, 6), PRepBN(6), nn.GELU())
    x = torch.randn(9, 4)
    calibrate(randomize(model), x)
    folded = reparameterize_model(model)
    assert isinstance(folded[1], ChannelAffine)
    torch.testing.assert_close(folded(x), model(x))


def test_a_layer_norm_is_left_alone() -> None:
    model = create_small("deit_tiny_inline_patch16_224").eval()
    before = copy.deepcopy(model.state_dict())
    fold_norms(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
    site = NormSite(model.blocks[0], "norm1")
    site.fold()
    assert isinstance(site.norm, nn.LayerNorm)


@torch.no_grad()
def test_shifted_window_block_equals_official() -> None:
    description, case = load_vision("op_softmax_swin_block")
    settings = description["constructor"]
    block = LinearSwinBlock(
        settings["dim"],
        tuple(settings["input_resolution"]),
        kind="softmax",
        num_heads=settings["num_heads"],
        window_size=settings["window_size"],
        shift_size=settings["shift_size"],
        mlp_ratio=settings["mlp_ratio"],
    ).double()
    block.load_state_dict({k: v.double() for k, v in group(case, "param/").items()})
    x = case["in/x"].double().unflatten(1, description["grid"])
    assert relative_error(block(x).flatten(1, 2), case["out"]) < 1e-6
