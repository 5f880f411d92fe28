"""FLUX's blocks in fewer passes: the stock blocks' values, and when the stock form is kept."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers import transformer_flux
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from kernel_checks import DEVICE, on_gpu_or_interpreted
from lintra.diffusion.attention import rotary
from lintra.diffusion.models import flux_blocks, fused_gelu
from lintra.kernels.ada_layer_norm import api, configs
from tiny_clear import clear_inputs, tiny_clear, tiny_stock

GRID = (3, 4)


@pytest.fixture
def model():
    model = tiny_clear("flux", radius=2).requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 2:  # else gates and shifts are small
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Takes this device for a GPU; names of what is computed together."""
    seen = []

    def counted(module, name):
        function = getattr(module, name)

        def call(*args):
            seen.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, call)

    def fused(bias, tokens, weight, *, use_gelu):
        return F.gelu(torch.addmm(bias, tokens, weight), approximate="tanh")

    for module in (flux_blocks, fused_gelu, rotary):
        monkeypatch.setattr(module, "on_gpu", lambda _: True)
    monkeypatch.setattr(fused_gelu, "_FUSED", fused)
    monkeypatch.setattr(fused_gelu, "_DTYPES", (torch.float32, torch.bfloat16))
    for name in ("_feed_forward", "_project_both", "linear_gelu"):
        counted(flux_blocks, name)
    return seen


def stock_form(model, inputs, monkeypatch, autocast=False):
    with monkeypatch.context() as patch, torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        for module in (flux_blocks, fused_gelu, rotary):
            patch.setattr(module, "on_gpu", lambda _: False)
        return model(**inputs).sample


def counts(model):
    return 2 * len(model.transformer_blocks), len(model.single_transformer_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_on_a_gpu_gives_the_same(model, calls, monkeypatch, dtype):
    model.to(dtype)
    inputs = {
        key: x.to(dtype) if x.is_floating_point() and "ids" not in key else x
        for key, x in clear_inputs("flux", GRID).items()
    }
    expected = stock_form(model, inputs, monkeypatch)
    assert not calls
    with torch.no_grad():
        out = model(**inputs).sample
    assert out.dtype == dtype
    double, single = counts(model)
    assert [calls.count(name) for name in ("_feed_forward", "_project_both", "linear_gelu")] == [
        double,
        single,
        single,
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@on_gpu_or_interpreted
def test_norms_and_sums_by_kernels(model, calls, monkeypatch):
    inputs = {key: x.to(DEVICE) for key, x in clear_inputs("flux", GRID).items()}
    expected = stock_form(model.to(DEVICE), inputs, monkeypatch)
    monkeypatch.setattr(configs, "GATED_ADD_MIN_ELEMENTS", 1)
    monkeypatch.setattr(api, "takes_kernel", lambda impl, x, reason: reason is None)
    add, sums = api.gated_add_triton, []
    monkeypatch.setattr(api, "gated_add_triton", lambda *args: (sums.append(1), add(*args))[1])
    with torch.no_grad():
        out = model(**inputs).sample
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert len(sums) == sum(counts(model))


def test_a_gradient_takes_the_stock_form(model, calls, monkeypatch):
    inputs = clear_inputs("flux", GRID)
    expected = stock_form(model, inputs, monkeypatch)
    model.transformer_blocks[0].attn.to_q.requires_grad_()
    out = model(**inputs).sample
    assert not calls
    assert torch.equal(out, expected)
    out.sum().backward()
    assert model.transformer_blocks[0].attn.to_q.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["norm", "accelerate", "lora", "autocast"])
def test_hooks_and_adapters_are_heard(model, calls, monkeypatch, kind):
    inputs, seen = clear_inputs("flux", GRID), []
    blocks, singles = model.transformer_blocks, model.single_transformer_blocks
    hook = ModelHook()
    hook.pre_forward = lambda _, *args, **kwargs: (seen.append(kind), (args, kwargs))[1]
    if kind == "norm":
        for block in (*blocks, *singles):
            (block.norm1 if block in list(blocks) else block.norm).register_forward_hook(
                lambda *_: seen.append(kind)
            )
    elif kind == "accelerate":
        for block in singles:
            add_hook_to_module(block.proj_mlp, hook)
            add_hook_to_module(block.proj_out, hook)
    elif kind == "lora":
        targets = ["proj_mlp", "proj_out", "ff.net.0.proj"]
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    expected = stock_form(model, inputs, monkeypatch, autocast=kind == "autocast").float()
    heard = len(seen)
    with torch.no_grad(), torch.autocast("cpu", enabled=kind == "autocast"):
        out = model(**inputs).sample.float()
    allowed = 0.05 if kind == "autocast" else 1e-6
    assert (out - expected).norm() <= allowed * expected.norm()
    assert len(seen) == 2 * heard
    assert (heard > 0) == (kind in ("norm", "accelerate"))
    assert "linear_gelu" not in calls


def test_a_second_norm_with_weights_is_called(model, calls, monkeypatch):
    for block in model.transformer_blocks:
        block.norm2 = torch.nn.LayerNorm(32)
        torch.nn.init.normal_(block.norm2.weight)
    inputs = clear_inputs("flux", GRID)
    expected = stock_form(model, inputs, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, expected)
    assert "_feed_forward" in calls


# Modules of blocks that may be computed together and not called.
NAMES = {
    "transformer_blocks.0.": (
        "norm1", "norm1.norm", "norm1_context.norm", "norm1.silu", "norm2", "norm2_context",
        "attn.norm_q", "attn.norm_added_k", "ff.net.0", "ff.net.0.proj",
    ),
    "single_transformer_blocks.1.": ("norm", "norm.norm", "act_mlp", "proj_mlp", "proj_out"),
}  # fmt: skip


@pytest.mark.parametrize("name", [head + tail for head in NAMES for tail in NAMES[head]])
def test_a_hook_on_any_module_is_heard(model, calls, monkeypatch, name):
    seen = []

    def hook(_, given, out):
        seen.append(given[0])
        tokens, *others = out if isinstance(out, tuple) else (out,)
        return (1.1 * tokens, *others) if others else 1.1 * tokens

    model.get_submodule(name).register_forward_hook(hook)
    inputs = clear_inputs("flux", GRID)
    expected = stock_form(model, inputs, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
    theirs, ours = seen
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert "_feed_forward" in calls  # in the other blocks


def test_a_hook_on_all_modules_is_heard(model, calls, monkeypatch):
    inputs, seen = clear_inputs("flux", GRID), []
    handle = register_module_forward_pre_hook(lambda module, _: seen.append(module))
    try:
        expected = stock_form(model, inputs, monkeypatch)
        theirs, seen[:] = list(seen), []
        with torch.no_grad():
            assert torch.equal(model(**inputs).sample, expected)
    finally:
        handle.remove()
    assert seen == theirs


def _other_norm(kind):
    def forward(self, *args, **kwargs):
        tokens, *gates = kind.forward(self, *args, **kwargs)
        return 2 * tokens, *gates

    return type("Other", (kind,), {"forward": forward})(32).requires_grad_(False)


class Wrapped(nn.Module):
    """Another class, without the attributes of what it stands for."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    "kind", ["silu", "erf", "norm1", "norm", "wrapped", "width", "heads", "third_output"]
)
def test_another_module_is_called(model, calls, monkeypatch, kind):
    for block in model.single_transformer_blocks:
        if kind in ("silu", "erf"):
            block.act_mlp = nn.SiLU() if kind == "silu" else nn.GELU()
        elif kind == "norm":
            block.norm = _other_norm(AdaLayerNormZeroSingle)
        elif kind == "wrapped":
            block.norm = Wrapped(block.norm)
    for block in model.transformer_blocks:
        if kind == "norm1":
            block.norm1 = _other_norm(AdaLayerNormZero)
        elif kind == "wrapped":
            block.norm1 = Wrapped(block.norm1)
        elif kind == "width":
            block.norm2 = nn.LayerNorm((12, 32), elementwise_affine=False)
        elif kind == "heads":
            block.attn.norm_q = nn.RMSNorm((2, 16), eps=1e-6)
        elif kind == "third_output":  # what an IP-Adapter adds
            block.attn.register_forward_hook(lambda _, __, out: (*out, 0.5 * out[0]))
    inputs = clear_inputs("flux", GRID)
    expected = stock_form(model, inputs, monkeypatch)
    with torch.no_grad():
        out = model(**inputs).sample
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert ("_project_both" in calls) == (kind not in ("norm", "wrapped"))


def test_one_condition_for_a_batch(model, calls, monkeypatch):
    inputs = clear_inputs("flux", GRID)
    for name in ("timestep", "guidance", "pooled_projections"):
        inputs[name] = inputs[name][:1]
    expected = stock_form(model, inputs, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
    assert "_feed_forward" in calls


def test_the_widest_dtype_wins(model, calls, monkeypatch):
    tokens, condition = torch.randn(2, 12, 32).bfloat16(), torch.randn(2, 32)
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        arguments = (tokens, tokens[:, :5], condition, None, {"spatial_shape": GRID, "radius": 2})
        with torch.no_grad():
            out = block(*arguments)
        assert [x.dtype for x in out] == [torch.float32] * 2
        for ours, theirs in zip(out, block(*arguments), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_operations_are_counted(model, calls, monkeypatch):
    inputs, counted = clear_inputs("flux", GRID), []
    for run in (lambda: stock_form(model, inputs, monkeypatch), lambda: model(**inputs)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_half_precision_is_clipped(monkeypatch):
    monkeypatch.setattr(flux_blocks, "on_gpu", lambda _: True)
    tokens = torch.tensor([[[-1e9, 1e9, 1.0]]])
    assert flux_blocks._clipped(tokens.half()).tolist() == [[[-65504, 65504, 1]]]
    assert flux_blocks._clipped(tokens) is tokens


def test_blocks_keep_their_names_and_their_weights():
    stock, ours = tiny_stock("flux"), tiny_clear("flux", radius=2)
    assert list(stock.state_dict()) == list(ours.state_dict())
    for name in ("transformer_blocks", "single_transformer_blocks"):
        theirs, mine = getattr(stock, name)[0], getattr(ours, name)[0]
        assert type(mine) is not type(theirs)
        assert type(mine).__name__ == type(theirs).__name__
        assert isinstance(mine, type(theirs))
        assert vars(mine).keys() == vars(theirs).keys()
        metadata = [TransformerBlockRegistry.get(type(block)) for block in (theirs, mine)]
        assert metadata[0].return_hidden_states_index == metadata[1].return_hidden_states_index
        text = "return_encoder_hidden_states_index"
        assert getattr(metadata[0], text) == getattr(metadata[1], text)
    assert transformer_flux.FluxTransformerBlock is not flux_blocks.FluxTransformerBlock


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu(model, dtype):
    model.cuda()
    inputs = {key: x.cuda() for key, x in clear_inputs("flux", GRID).items()}
    ids = {key: inputs.pop(key) for key in ("img_ids", "txt_ids")}

    def run(kind):
        return model.to(kind)(**{key: x.to(kind) for key, x in inputs.items()}, **ids).sample

    with torch.no_grad():
        exact = run(torch.float64)
        fused = run(dtype)
    stock = run(dtype)  # with gradients on
    error, allowed = (float((x.double() - exact).norm()) for x in (fused, stock))
    assert error <= 1.5 * allowed + torch.finfo(dtype).eps * float(exact.norm())
