"""What timm's own tests check, over every name at a small size; then what its users rely on."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from lintra.vision import PRepBN, fold_norms, save_backbone
from vision_names import NAMES, create_small, small_arguments

ONE_A_FAMILY = [
    "deit_tiny_inline_patch16_224",
    "deit_tiny_slab_patch16_224",
    "swin_base_inline_patch4_window56_224",
    "swin_tiny_slab_patch4_window56_224",
    "pvt_tiny_prepbn",
    "pvt_tiny_slab",
    "pvt_tiny_inline",
    "cswin_tiny_slab_224",
    "cswin_tiny_inline_224",
]
every_name = pytest.mark.parametrize("name", NAMES)
one_a_family = pytest.mark.parametrize("name", ONE_A_FAMILY)


def image(batch: int = 2, size: tuple[int, int] = (64, 64), channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, *size)


@every_name
@torch.no_grad()
def test_forward(name: str) -> None:
    model = create_small(name).eval()
    for batch in (1, 3):
        out = model(image(batch))
        assert out.shape == (batch, 7)
        assert out.isfinite().all()


@every_name
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_backward_reaches_every_parameter(name: str, checkpointing: bool) -> None:
    model = create_small(name, drop_path_rate=0.0).train()
    model.set_grad_checkpointing(checkpointing)
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.set_mix(0.5)
    model(image()).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm1d)}
    assert counts <= {1}


@one_a_family
def test_checkpointing_changes_nothing(name: str) -> None:
    plain = create_small(name, drop_path_rate=0.0)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    x = image()
    for model in (plain, checkpointed):
        model.train()(x).square().mean().backward()
    for (name_a, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name_a)
    for a, b in zip(plain.buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@every_name
@torch.no_grad()
def test_default_cfg_and_classifier(name: str) -> None:
    model = create_small(name).eval()
    cfg = model.default_cfg
    state = model.state_dict()
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['first_conv']}.weight" in state
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    x = image()
    tokens = model.forward_features(x)
    features = model.forward_head(tokens, pre_logits=True)
    assert features.shape == (2, model.num_features)
    assert model.num_features == model.head_hidden_size
    torch.testing.assert_close(model(x), model.forward_head(tokens))

    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(0, "")
    assert model(x).ndim == tokens.ndim
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)
    assert create_small(name, num_classes=0).eval()(x).shape == (2, model.num_features)
    arguments = {"num_classes": 0, "global_pool": ""}
    assert create_small(name, **arguments).eval()(x).shape == tokens.shape


@one_a_family
def test_idle_dropout_is_left_out(name: str) -> None:
    idle, active = create_small(name), create_small(name, proj_drop_rate=0.1)
    dropouts = [n for n, m in idle.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert all(n.endswith("attn_drop") for n in dropouts)
    blocks = sum(n.endswith("mlp") for n, _ in active.named_modules())
    rates = [m.p for m in active.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates.count(0.1) == 3 * blocks


@every_name
@torch.no_grad()
def test_features_only(name: str) -> None:
    model = create_small(name, features_only=True).eval()
    maps = model(image())
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert [m.shape[1] for m in maps] == channels
    assert [m.shape[-1] for m in maps] == [64 // reduction for reduction in reductions]
    two = create_small(name, features_only=True, out_indices=(0, 2)).eval()
    assert len(two(image())) == 2


@every_name
@torch.no_grad()
def test_intermediates(name: str) -> None:
    model = create_small(name).eval()
    x = image()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(maps) == len(model.feature_info)
    for stage, info in zip(maps, model.feature_info, strict=True):
        assert stage.shape[:2] == (2, info["num_chs"])
    (normed,) = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    if final.ndim == 4:
        torch.testing.assert_close(normed, final.permute(0, 3, 1, 2))
    (second,) = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(second, maps[1])
    model.prune_intermediate_layers([1])
    pruned = model.forward_intermediates(x, [1], intermediates_only=True)
    torch.testing.assert_close(pruned[0], maps[1])


@one_a_family
@torch.no_grad()
def test_fx_features(name: str) -> None:
    model = create_small(name)
    traced = create_small(name, features_only=True, feature_cls="fx", out_indices=(0, 1, 2))
    traced.load_state_dict(
        {f"graph_module.{k}": v for k, v in model.state_dict().items()}, strict=False
    )
    maps = traced.eval()(image())
    assert len(maps) == 3
    assert all(m.isfinite().all() for m in maps)


@one_a_family
@pytest.mark.parametrize("wrapper", ["list", "dict", "hook"])
@torch.no_grad()
def test_feature_wrappers_of_timm(name: str, wrapper: str) -> None:
    if name.startswith("deit") and wrapper != "hook":
        pytest.skip("timm's ViT has no module after which to stop")
    options = {"features_only": True, "feature_cls": wrapper, "out_indices": (0, 1, 2)}
    model = create_small(name, **options).eval()
    maps = model(image())
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert [m.shape[-1] for m in maps] == model.feature_info.channels()


@every_name
def test_parameter_groups(name: str) -> None:
    model = create_small(name)
    names = [n for n, _ in model.named_parameters()]
    assert model.no_weight_decay() <= set(names)
    tables = ("pos_embed", "positional_encoding", "relative_position_bias_table", "alpha")
    assert {n for n in names if n.endswith(tables)} <= model.no_weight_decay()
    for coarse in (False, True):
        matcher = model.group_matcher(coarse=coarse)
        groups = group_parameters(model, matcher)
        assert sorted(n for group in groups.values() for n in group) == sorted(names)
        stem = "patch_embed.proj.weight"
        assert stem in groups[0]
    groups = param_groups_layer_decay(model, weight_decay=0.05)
    scales = {group["lr_scale"] for group in groups}
    assert len(scales) > 2
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    undecayed = {
        id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]
    }
    for n, p in model.named_parameters():
        if n.endswith(tables):
            assert id(p) in undecayed


@every_name
@torch.no_grad()
def test_other_sizes(name: str) -> None:
    size = (64, 96)
    fixed = create_small(name, img_size=size).eval()
    assert fixed(image(size=size)).shape == (2, 7)
    model = create_small(name).eval()
    model.set_input_size(img_size=size)
    assert model(image(size=size)).shape == (2, 7)
    shapes = {k: v.shape for k, v in fixed.state_dict().items()}
    if not name.startswith("swin"):  # timm scales Swin's windows with the map
        assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    if name.startswith(("deit", "swin")):
        model = create_small(name, dynamic_img_size=True).eval()
    else:
        model = create_small(name).eval()
    same = model(image())
    for other in (size, (32, 32), (96, 64)):
        if name == "pvt_tiny_prepbn" and min(other) < 64:
            continue
        assert model(image(size=other)).shape == (2, 7)
    assert model(image()).shape == same.shape


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n.startswith(("deit", "swin")) and not n.endswith("224")]
)
def test_size_of_the_configuration_is_that_of_the_model(name: str) -> None:
    arguments = {k: v for k, v in small_arguments(name).items() if k != "img_size"}
    model = timm.create_model(
        name, **arguments, device="meta", pretrained_cfg_overlay={"input_size": (3, 96, 96)}
    )
    assert model.patch_embed.img_size == (96, 96)


@torch.no_grad()
def test_windows_after_resizing_are_those_of_a_new_model() -> None:
    name = "swin_tiny_slab_patch4_window56_224"
    model = create_small(name)
    model.set_input_size(img_size=(128, 128), window_size=8)
    fresh = create_small(name, img_size=128, window_size=8)

    def windows(model: nn.Module) -> list:
        blocks = [m for m in model.modules() if hasattr(m, "shift_size")]
        return [(b.window_size, b.shift_size, b.window_area) for b in blocks]

    assert windows(model) == windows(fresh)
    assert model.eval()(image(size=(128, 128))).shape == (2, 7)


@pytest.mark.parametrize("name", ["pvt_tiny_slab", "deit_tiny_slab_patch16_224"])
@torch.no_grad()
def test_set_input_size_equals_resampling_on_the_fly(name: str) -> None:
    options = {"dynamic_img_size": True} if name.startswith("deit") else {}
    model = create_small(name, **options).eval()
    for parameter in model.parameters():
        if parameter.ndim == 3:
            parameter.normal_(std=0.1)
    x = image(size=(96, 64))
    expected = model(x)
    model.set_input_size(img_size=(96, 64))
    torch.testing.assert_close(model(x), expected)


@one_a_family
@torch.no_grad()
def test_constructor_options(name: str) -> None:
    model = create_small(name, in_chans=1, drop_path_rate=0.3, num_classes=11).eval()
    assert model(image(channels=1)).shape == (2, 11)
    assert sum("DropPath" in type(m).__name__ for m in model.modules()) > 0
    half = create_small(name, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(image().bfloat16()).isfinite().all()
    meta = create_small(name, device="meta")
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    assert meta(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)
    meta.to_empty(device="cpu")
    meta.init_weights(mode="reset")
    for module in meta.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    assert meta.eval()(image()).isfinite().all()
    for module in meta.modules():
        if isinstance(module, PRepBN):
            assert float(module.mix) == 1.0


@one_a_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_finite(name: str, dtype: torch.dtype) -> None:
    model = create_small(name).train()
    with torch.autocast("cpu", dtype):
        out = model(image())
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.to(dtype).eval()(image().to(dtype)).isfinite().all()


@one_a_family
@torch.no_grad()
def test_saves_for_timm(name: str, tmp_path) -> None:
    model = create_small(name, img_size=(64, 96), norm="prepbn").eval()
    if name.startswith("deit"):
        model.set_input_size(img_size=(96, 64))
    save_backbone(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    size = (96, 64) if name.startswith("deit") else (64, 96)
    x = image(size=size)
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize(
    "name", ["deit_tiny_slab_patch16_224", "swin_tiny_slab_patch4_window56_224", "pvt_tiny_slab"]
)
@torch.no_grad()
def test_saves_folded_for_timm(name: str, tmp_path) -> None:
    model = fold_norms(create_small(name, img_size=72).eval())
    save_backbone(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = image(size=(72, 72))
    torch.testing.assert_close(loaded(x), model(x))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features(x), expected)


@one_a_family
@torch.no_grad()
def test_copies_and_pickles(name: str) -> None:
    model = create_small(name).eval()
    x = image()
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)


@every_name
def test_errors(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag"):
        timm.create_model(f"{name}.nowhere")
    with pytest.raises(ValueError, match=r"`attn` must be one of softmax, sla, inline, got 'x'"):
        create_small(name, attn="x")
    with pytest.raises(ValueError, match=r"`norm` must be one of ln, prepbn, repbn, got 'bn'"):
        create_small(name, norm="bn")
    with pytest.raises(ValueError, match=r"`attn` must be one choice, one a stage or one a block"):
        create_small(name, attn=("sla", ("inline",) * 9))
    with pytest.raises(ValueError, match=r"`img_size` must "):
        create_small(name, img_size=2)
    with pytest.raises(NotImplementedError, match=r"must not be compiled with torch.jit.script"):
        torch.jit.script(create_small(name))


def test_more_errors() -> None:
    message = r"`img_size` must give every stage a map of at least 2 x 2, got 1 x 1"
    with pytest.raises(ValueError, match=message):
        create_small("pvt_tiny_slab")(image(size=(16, 16)))
    name = "swin_tiny_slab_patch4_window56_224"
    with pytest.raises(ValueError, match=r"`linear_window_size` must divide the map of 16 x 16"):
        create_small(name, linear_window_size=5)
    with pytest.raises(TypeError, match=r"`attn` must be a string or a sequence of them, got int"):
        create_small(name, attn=1)
    with pytest.raises(ValueError, match=r"`norm` must be one choice, .* got \(1, 1, 1, 1\)"):
        create_small(name, norm=(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"`head_dim` must be 4 for linear attention, got 8"):
        create_small(name, head_dim=8)
    with pytest.raises(ValueError, match=r"`output_fmt` must be NCHW or NHWC, got 'NLC'"):
        create_small("pvt_tiny_slab").forward_intermediates(image(), output_fmt="NLC")
    with pytest.raises(ValueError, match=r"`patch_size` must be 4, got 8"):
        create_small("pvt_tiny_slab").set_input_size(patch_size=8)
    for option, usual in (("qk_norm", False), ("scale_attn_norm", False), ("proj_bias", True)):
        message = f"`{option}` must be {usual} with linear attention, got {not usual}"
        with pytest.raises(ValueError, match=message):
            create_small("deit_tiny_slab_patch16_224", **{option: not usual})
    with pytest.raises(ValueError, match=r"`patch_drop_rate` must be 0 .* whole grid, got 0.25"):
        create_small("deit_tiny_inline_patch16_224", patch_drop_rate=0.25)
    model = create_small("deit_tiny_prepbn_patch16_224", patch_drop_rate=0.25, qk_norm=True)
    assert model.train()(image()).shape == (2, 7)
    model = create_small("deit_tiny_slab_patch16_224")
    with pytest.raises(ValueError, match=r"`attn_mask` must be None for linear attention"):
        model(image(), attn_mask=torch.zeros(16, 16))
    assert create_small(name, linear_window_size=8)(image()).shape == (2, 7)
    for name in ("deit_tiny_slab_patch16_224", "pvt_tiny_slab", "cswin_tiny_slab_224"):
        with pytest.raises(ValueError, match=r"`kernel_size` must be odd and positive, got 4"):
            create_small(name, sla_kernel_size=4)
