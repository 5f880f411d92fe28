"""RepBN, PRepBN, their schedule and recalibration."""

import copy

import pytest
import torch
from timm.layers import LayerNorm
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.checkpoint import checkpoint

from golden_vision import group, load_vision, relative_error
from lintra.vision.norm import PRepBN, RepBN, norm_factory
from lintra.vision.schedule import PRepBNSchedule, recalibrate_batchnorm

# Cases were computed in float64 and stored in float32.
TOLERANCE = 1e-6


def official_name(name: str) -> str:
    return name.replace("norm2.", "repbn.").replace("norm1.", "ln.")


def load(module: nn.Module, tensors: dict[str, torch.Tensor], *prefixes: str) -> None:
    """Parameters and buffers of a case into `module`, in float64."""
    module.double()
    state = {k: v for prefix in prefixes for k, v in group(tensors, prefix).items()}
    missing, unexpected = module.load_state_dict(
        {official_name(k): v.double() for k, v in state.items()}, strict=False
    )
    assert unexpected == []
    assert [k for k in missing if not k.endswith("num_batches_tracked")] == []


def check_step(
    module: nn.Module, x: torch.Tensor, case: dict[str, torch.Tensor], prefix: str
) -> None:
    """One forward and backward against `prefix` of a case: output, gradients, buffers after."""
    module.zero_grad()
    x = x.double().requires_grad_()
    out = module(x)
    out.backward(case["cotangent"].double())
    assert relative_error(out, case[f"{prefix}out"]) < TOLERANCE
    assert relative_error(x.grad, case[f"{prefix}grad/in/x"]) < TOLERANCE
    stored = {official_name(k): v for k, v in group(case, f"{prefix}grad/param/").items()}
    for name, parameter in module.named_parameters():
        if name in stored:
            error = (parameter.grad - stored[name].double()).abs().max()
            assert error < TOLERANCE * (1 + stored[name].abs().max()), name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name
    buffers = dict(module.named_buffers())
    for name, value in group(case, f"{prefix}buffer/").items():
        assert relative_error(buffers[official_name(name)], value) < TOLERANCE, name


def test_repbn_equals_official() -> None:
    _, case = load_vision("op_repbn")
    module = RepBN(12)
    load(module, case, "param/", "buffer/")
    module.eval()
    check_step(module, case["in/x"], case, "eval/")
    module.train()
    check_step(module, case["in/x"], case, "train/")


@pytest.mark.parametrize("name", ["op_linearnorm", "op_linearnorm_warm"])
def test_prepbn_and_schedule_equal_official(name: str) -> None:
    description, case = load_vision(name)
    module = PRepBN(12, eps=description["layernorm_eps"])
    load(module, case, "param/", "buffer/")
    settings = description["constructor"]
    schedule = PRepBNSchedule(module, settings["step"], fraction=1.0, warmup_steps=settings["warm"])
    for step, mix in enumerate(description["lambda_per_step"]):
        assert schedule.mix == (1.0 if mix is None else mix)
        assert float(module.mix) == schedule.mix
        check_step(module, case["in/x"][step], case, f"step{step}/")
        schedule.step()
    module.eval()
    check_step(module, case["in/x"][0], case, "eval/")


@pytest.mark.parametrize("shape", [(5, 12), (3, 7, 12), (2, 4, 3, 12)])
@pytest.mark.parametrize("name", ["prepbn", "repbn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shapes_and_dtypes(shape: tuple, name: str, dtype: torch.dtype) -> None:
    module = norm_factory(name, 1e-6)(12, device=None, dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    for training in (True, False):
        out = module.train(training)(x)
        out.sum().backward()
        assert out.shape == x.shape
        assert out.dtype == dtype
        assert out.isfinite().all()
    assert x.grad.isfinite().all()


def test_state_dict_names_are_public() -> None:
    batch_norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["alpha", *(f"bn.{name}" for name in batch_norm)]
    assert list(RepBN(4).state_dict()) == names
    assert list(PRepBN(4).state_dict()) == [
        "ln.weight",
        "ln.bias",
        *(f"repbn.{name}" for name in names),
    ]


def test_mix_stays_float32_and_unrounded() -> None:
    module = PRepBN(4)
    module.set_mix(0.3)
    assert module.half().mix.dtype == torch.float32
    assert float(module.mix) == pytest.approx(0.3, abs=1e-7)
    meta = PRepBN(4, device="meta").to_empty(device="cpu")
    meta.init_non_persistent_buffers()
    assert float(meta.mix) == 1.0


def test_layer_norm_is_not_computed_once_the_mix_is_zero() -> None:
    module = PRepBN(4)
    calls = []
    module.ln.register_forward_hook(lambda *_: calls.append(1))
    schedule = PRepBNSchedule(module, 2, fraction=0.5)
    module(torch.randn(3, 4))
    assert len(calls) == 1
    schedule.step()
    module(torch.randn(3, 4)).sum().backward()
    assert len(calls) == 1
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_schedule_saves_and_resumes() -> None:
    schedule = PRepBNSchedule(PRepBN(4), 100)
    for _ in range(20):
        schedule.step()
    other = PRepBN(4)
    resumed = PRepBNSchedule(other, 100)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.mix == schedule.mix == pytest.approx(0.75)
    assert float(other.mix) == pytest.approx(0.75)
    assert PRepBNSchedule(PRepBN(4), 100, fraction=0.0).mix == 0.0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_moves_statistics_once(use_reentrant: bool) -> None:
    plain, checkpointed = PRepBN(6), PRepBN(6)
    plain.set_mix(0.5)
    checkpointed.set_mix(0.5)
    x = torch.randn(4, 5, 6, requires_grad=True)
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(checkpointed, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(checkpointed.state_dict()[name], value, msg=name)


def test_accumulation_moves_statistics_as_much_as_one_batch() -> None:
    x = torch.randn(8, 6)
    whole, parts = RepBN(6), RepBN(6)
    PRepBNSchedule(parts, 10, accumulation_steps=4)
    whole(x)
    for _ in range(4):
        parts(x)
    torch.testing.assert_close(parts.bn.running_mean, whole.bn.running_mean)
    torch.testing.assert_close(parts.bn.running_var, whole.bn.running_var)


def test_sync_batchnorm_and_ema() -> None:
    model = nn.Sequential(nn.Linear(4, 6), PRepBN(6))
    model(torch.randn(7, 4))
    x = torch.randn(5, 4)
    expected = model.eval()(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert isinstance(synced[1].repbn.bn, nn.SyncBatchNorm)
    torch.testing.assert_close(synced(x), expected)
    ema = ModelEmaV3(model, decay=0.5)
    ema.update(model)
    torch.testing.assert_close(ema.module.eval()(x), expected)


def test_compiles_without_breaks() -> None:
    module = PRepBN(6)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x = torch.randn(4, 6)
    schedule = PRepBNSchedule(module, 2, fraction=0.5)
    for _ in range(2):
        expected = copy.deepcopy(module)(x)
        torch.testing.assert_close(compiled(x), expected)
        schedule.step()


@pytest.mark.parametrize("as_tuple", [True, False])
def test_recalibration_measures_means_over_batches(as_tuple: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.9), RepBN(4)).train()
    model[1].bn.momentum = 0.3
    batches = [torch.randn(50, 4) + 3 for _ in range(3)]
    loader = [(batch, torch.zeros(50)) for batch in batches] if as_tuple else batches
    assert recalibrate_batchnorm(model, loader, passes=2) is model
    bn = model[1].bn
    torch.testing.assert_close(bn.running_mean, torch.stack(batches).mean((0, 1)))
    torch.testing.assert_close(bn.running_var, torch.stack(batches).var(1).mean(0))
    assert model.training
    assert bn.momentum == 0.3


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"`x` must have 4 channels in its last dimension, got"):
        RepBN(4)(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"`x` must hold more than one token"):
        PRepBN(4)(torch.randn(1, 1, 4))
    with pytest.raises(ValueError, match=r"`value` must be in \[0, 1\], got 2"):
        PRepBN(4).set_mix(2)
    with pytest.raises(ValueError, match=r"`norm` must be one of ln, prepbn, repbn, got 'bn'"):
        norm_factory("bn", 1e-5)
    with pytest.raises(ValueError, match=r"`loader` must yield at least one batch"):
        recalibrate_batchnorm(RepBN(4), [])
    assert RepBN(4).eval()(torch.randn(1, 1, 4)).shape == (1, 1, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, r"`total_steps` must be positive, got 0"),
        ({"fraction": 1.5}, r"`fraction` must be in \[0, 1\], got 1.5"),
        ({"warmup_steps": -1}, r"`warmup_steps` must not be negative, got -1"),
        ({"accumulation_steps": 0}, r"`accumulation_steps` must be positive, got 0"),
    ],
)
def test_schedule_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRepBNSchedule(PRepBN(4), **{"total_steps": 10, **arguments})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_is_that_of_timm(dtype: torch.dtype) -> None:
    mine, theirs = norm_factory("ln", 1e-6)(12), LayerNorm(12)
    assert isinstance(mine, LayerNorm)
    x = torch.randn(2, 5, 12, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mine(x), theirs(x))
    mine, theirs = mine.to(dtype), theirs.to(dtype)
    assert torch.equal(mine(x), theirs(x))
    assert mine.to("meta")(x.to("meta")).shape == x.shape
