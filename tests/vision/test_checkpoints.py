"""Official containers and layouts: read safely, loaded strictly, saved for timm."""

import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from golden.golden_fill_vision import state_dict
from lintra.tools import convert
from lintra.vision import PRepBN, fold_norms, load_official
from lintra.vision.conversion import convert_official, official_models
from lintra.vision.unpickling import InertObject, read_checkpoint_file
from vision_names import NAMES, create_small

COUNTERS = ("warm", "iter", "total_step")


def official_name(name: str, model: nn.Module) -> str:
    """Our name of a tensor as the authors write it: the inverse of the loader's rules."""
    kind = type(model).__name__
    name = name.replace(".ln.", ".norm1.").replace(".repbn.", ".norm2.")
    name = name.replace("head.fc.", "head.")
    parts = name.split(".")
    if kind == "LinearSwinTransformer" and "downsample" in name:
        parts[1] = str(int(parts[1]) - 1)
    elif kind == "LinearPyramidTransformer":
        if parts[0] == "patch_embed":
            parts[0] = "patch_embed1"
        elif parts[0] == "stages":
            number = int(parts[1]) + 1
            new = {
                "pos_embed": f"pos_embed{number}",
                "downsample": f"patch_embed{number}",
                "blocks": f"block{number}",
            }
            parts = [new[parts[2]], *parts[3:]]
    elif kind == "LinearCSwinTransformer":
        if parts[0] == "patch_embed":
            parts = ["stage1_conv_embed", "0" if parts[1] == "proj" else "2", *parts[2:]]
        elif parts[0] == "stages" and parts[2] == "downsample":
            leaf = {"proj": "conv"}.get(parts[3], parts[3])
            parts = [f"merge{parts[1]}", leaf, *parts[4:]]
        elif parts[0] == "stages":
            parts = [f"stage{int(parts[1]) + 1}", *parts[3:]]
            if parts[2] == "attn" and parts[3] in ("qkv", "proj"):
                del parts[2]
            elif parts[2] == "attn":
                rest = parts[3:]
                index = "0"
                if rest[0] == "lepe":
                    index = rest.pop(1) if rest[1].isdigit() else "0"
                    rest[0] = "get_v"
                parts = [*parts[:2], "attns", index, *rest]
    return ".".join(parts)


def official_state(model: nn.Module, left: int = 30, total: int = 120) -> dict[str, Tensor]:
    """Weights of `model` as the authors would have saved them, counters included."""
    state = OrderedDict()
    for name, value in model.state_dict().items():
        theirs = official_name(name, model)
        if theirs.endswith("norm1.weight") and name.endswith("ln.weight"):
            site = theirs.removesuffix("norm1.weight")
            for counter, number in zip(COUNTERS, (0, left, total), strict=True):
                state[site + counter] = torch.tensor(number)
        state[theirs] = value.clone()
    return state


def randomize(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim < 2:
                value.uniform_(0.1, 0.5)
            elif value.is_floating_point():
                value.normal_(std=0.1)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_the_official_layout(name: str) -> None:
    source, target = randomize(create_small(name)), create_small(name)
    state = official_state(source)
    if "slab" in name and "deit" in name:
        state["cls_token"] = torch.zeros(1, 1, 24)
    report = load_official(target, {"model": state, "epoch": 3})
    assert report.source == "model"
    assert report.untouched == []
    for key, value in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[key], value)
    mixes = {float(m.mix) for m in target.modules() if isinstance(m, PRepBN)}
    assert mixes <= {0.25}
    assert report.mix == (0.25 if mixes else None)
    assert "loaded" in str(report)


@pytest.mark.parametrize(
    "name", ["deit_tiny_prepbn_patch16_224", "swin_tiny_prepbn_patch4_window7_224"]
)
def test_both_norm_layouts_fit_both_norms(name: str) -> None:
    """Plain RepBN and LayerNorm + RepBN, whatever the model's norm: equal in evaluation."""
    x = torch.randn(2, 3, 64, 64)
    sources = {norm: randomize(create_small(name, norm=norm)) for norm in ("repbn", "prepbn")}
    for norm, source in sources.items():
        state = official_state(source)
        expected = source.eval()(x)
        for other in sources:
            model = create_small(name, norm=other).eval()
            report = load_official(model, state)
            torch.testing.assert_close(model(x), expected)
            assert bool(report.untouched) == (norm == "repbn" and other == "prepbn")
            assert all(".ln." in key for key in report.untouched)
            torch.testing.assert_close(fold_norms(model)(x), expected, rtol=1e-4, atol=1e-4)


def test_ema_is_preferred_and_prefixes_are_stripped() -> None:
    name = "deit_tiny_inline_patch16_224"
    plain, averaged = randomize(create_small(name)), randomize(create_small(name))
    container = {
        "state_dict": {f"module.{k}": v for k, v in official_state(plain).items()},
        "state_dict_ema": official_state(averaged),
    }
    model = create_small(name)
    assert load_official(model, container).source == "state_dict_ema"
    torch.testing.assert_close(model.head.weight, averaged.head.weight)
    assert load_official(model, container, prefer_ema=False).source == "state_dict"
    torch.testing.assert_close(model.head.weight, plain.head.weight)
    assert load_official(model, official_state(plain)).source == ""
    nested = {"model": {"state_dict": official_state(plain), "ema": official_state(averaged)}}
    assert load_official(model, nested).source == "model.ema"
    torch.testing.assert_close(model.head.weight, averaged.head.weight)
    nested = {"state_dict_ema": {"module": official_state(averaged), "decay": 0.99}, "epoch": 1}
    assert load_official(model, nested).source == "state_dict_ema.module"


@pytest.mark.parametrize(
    "name", ["deit_tiny_slab_patch16_224", "pvt_tiny_slab", "swin_tiny_slab_patch4_window56_224"]
)
def test_position_tables_are_resized(name: str) -> None:
    source = randomize(create_small(name))
    model = create_small(name, img_size=96)
    report = load_official(model, official_state(source))
    assert report.resized
    for key in report.resized:
        assert torch.allclose(
            model.state_dict()[key].mean(), source.state_dict()[key].mean(), atol=0.02
        )


@torch.no_grad()
def test_resized_when_loaded_equals_resampled_on_the_fly() -> None:
    source = randomize(create_small("pvt_tiny_slab")).eval()
    model = create_small("pvt_tiny_slab", img_size=(96, 64)).eval()
    load_official(model, official_state(source))
    x = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(model(x), source(x))


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> type:
    """A module yacs.config like the authors', whose objects set a flag when they are rebuilt."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        rebuilt = False

        def __setstate__(self, state: dict) -> None:
            CfgNode.rebuilt = True
            self.__dict__.update(state)

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return CfgNode


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_container_with_a_pickled_configuration(
    tmp_path: Path, yacs: type, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    config = yacs(MODEL=yacs(TYPE="slab_deit"))
    config.__dict__["__immutable__"] = True
    source = randomize(create_small("deit_tiny_slab_patch16_224"))
    file = tmp_path / "max_acc.pth"
    container = {"model": official_state(source), "epoch": 299, "config": config, "best": {1, 2}}
    torch.save(container, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    yacs.rebuilt = False
    model = create_small("deit_tiny_slab_patch16_224")
    load_official(model, file)
    torch.testing.assert_close(model.head.weight, source.head.weight)
    assert not yacs.rebuilt
    assert "yacs.config" not in sys.modules
    contents = read_checkpoint_file(file)
    assert contents["config"]["MODEL"]["TYPE"] == "slab_deit"
    assert contents["epoch"] == 299


class _Attack:
    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_no_code_of_the_file_runs(tmp_path: Path) -> None:
    attack = _Attack()
    attack.path = str(tmp_path / "made-by-the-file")
    file = tmp_path / "evil.pth"
    torch.save({"model": {"weight": torch.zeros(1)}, "config": attack}, file)
    contents = read_checkpoint_file(file)
    assert isinstance(contents["config"], InertObject)
    assert not Path(attack.path).exists()


def test_safetensors(tmp_path: Path) -> None:
    source = randomize(create_small("pvt_tiny_inline"))
    save_file(official_state(source), tmp_path / "model.safetensors")
    model = create_small("pvt_tiny_inline")
    load_official(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(model.head.fc.weight, source.head.fc.weight)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    model = create_small("pvt_tiny_inline")
    with pytest.raises(ValueError, match=r"`checkpoint` must be an existing file, got .*none.pth"):
        load_official(model, tmp_path / "none.pth")
    whole = tmp_path / "whole.pth"
    torch.save({"model": official_state(model)}, whole)
    for name, data in [("cut.pth", whole.read_bytes()[:5000]), ("text.pth", b"<html>"),
                       ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{")]:  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"must be a whole file .* got .*{name}"):
            load_official(model, tmp_path / name)


def test_misfits_leave_the_model_alone() -> None:
    model = create_small("deit_tiny_slab_patch16_224")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = official_state(model)
    missing = {k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.bias"}
    no_ln = {k: v for k, v in state.items() if "norm1.norm1" not in k}
    cases = [
        (missing, r"must fit LinearVisionTransformer exactly, got 1 missing \(blocks.1.mlp.fc1"),
        ({**state, "extra": torch.ones(2)}, r"got 1 left over \(extra\)"),
        ({**state, "head.bias": torch.ones(3)}, r"head.bias \(3,\) for \(7,\)"),
        (official_state(create_small("pvt_tiny_slab")), r"missing \(.*left over \("),
        (official_state(create_small("deit_tiny_inline_patch16_224")), r"left over \(blocks.0"),
        ({"optimizer": {"lr": 1}}, r"must be a state dict or hold one under .* got keys optimizer"),
        ([1], r"`checkpoint` must be a path or a mapping, got list"),
    ]  # fmt: skip
    for checkpoint, message in cases:
        with pytest.raises(ValueError, match=message):
            load_official(model, checkpoint)
    assert load_official(model, no_ln).untouched
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
    with pytest.raises(ValueError, match=r"`model` must be a backbone of lintra.vision, got Lin"):
        load_official(nn.Linear(2, 2), state)


@pytest.mark.parametrize(
    ("variant", "name", "method"),
    [
        ("slab_deit_t", "deit_tiny_slab_patch16_224", "slab"),
        ("inline_deit_tiny", "deit_tiny_inline_patch16_224", "inline"),
    ],
)
def test_convert_for_timm(tmp_path: Path, variant: str, name: str, method: str) -> None:
    from golden_vision import load_vision

    description, case = load_vision(variant)
    state = state_dict(description["layout"], case)
    state = {k: v[:10].clone() if k.startswith("head.") else v for k, v in state.items()}
    torch.save({"model": state, "config": InertObject()}, tmp_path / "official.pth")
    out = tmp_path / "out"
    words = ["--from", method, str(tmp_path / "official.pth"), "--model", name, str(out)]
    assert convert.main(words) == 0
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert model.num_classes == 10
    assert model.pretrained_cfg["crop_mode"] == ("squash" if method == "inline" else "center")
    expected = timm.create_model(name, num_classes=10).eval()
    load_official(expected, state)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model(x), expected(x))
    larger = timm.create_model(f"local-dir:{out}", pretrained=True, img_size=256).eval()
    assert larger(torch.randn(1, 3, 256, 256)).shape == (1, 10)


def test_convert_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert convert.main(["--from", "slab", "none.pth", out]) == 2
    assert "error: `--model` must be given for --from slab" in capsys.readouterr().err
    name = "deit_tiny_inline_patch16_224"
    assert convert.main(["--from", "slab", "none.pth", "--model", name, out]) == 2
    assert "error: `model` must be one of cswin_small_slab_224," in capsys.readouterr().err
    assert convert.main(["--from", "inline", "none.pth", "--model", name, out]) == 2
    assert "error: `checkpoint` must be an existing file" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"`method` must be one of slab, inline, got 'other'"):
        convert_official("x", name, out, method="other")
    assert sorted(official_models("slab") + official_models("inline")) == sorted(NAMES)
