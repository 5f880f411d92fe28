"""GELU in the kernel of the matrix product: where it serves, and that it gives the same."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lintra.diffusion.models import fused_gelu
from lintra.diffusion.models.fused_gelu import FusedGELU, fuse_gelu


def fused(bias, tokens, weight, *, use_gelu):
    """What cuBLAS does; the CPU's has the other form of GELU."""
    assert use_gelu
    fused.calls += 1
    return F.gelu(torch.addmm(bias, tokens, weight), approximate="tanh")


@pytest.fixture
def module(monkeypatch):
    """A `FusedGELU` in evaluation that takes this device for a GPU."""
    monkeypatch.setattr(fused_gelu, "on_gpu", lambda tokens: True)
    monkeypatch.setattr(fused_gelu, "_FUSED", fused)
    fused.calls = 0
    return FusedGELU(GELU(8, 32, approximate="tanh")).bfloat16().requires_grad_(False)


def assert_same(module, calls, tokens=None):
    tokens = torch.randn(2, 3, 8, dtype=torch.bfloat16) if tokens is None else tokens
    expected = F.gelu(module.proj(tokens), approximate="tanh")
    fused.calls = 0
    assert torch.equal(module(tokens), expected)
    assert fused.calls == calls


def test_inference_takes_one_call(module):
    assert_same(module, 1)
    assert_same(module, 1, torch.randn(5, 8, dtype=torch.bfloat16))
    assert_same(module, 1, torch.randn(2, 0, 8, dtype=torch.bfloat16))
    module.proj.weight.requires_grad_()
    with torch.no_grad():
        assert_same(module, 1)


def test_what_only_two_calls_can_do(module, monkeypatch):
    tokens = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    assert_same(module, 0, tokens)
    module(tokens).sum().backward()
    assert tokens.grad is not None
    with FlopCounterMode(display=False) as counter:
        assert_same(module, 0)
    assert counter.get_total_flops() == 2 * 2 * 6 * 8 * 32  # of the module and of what is expected
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(module, 0)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), module(tokens))
    assert_same(module.float(), 0, torch.randn(2, 8))
    module.bfloat16()
    module.approximate, fused.calls = "none", 0
    tokens = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert torch.equal(module(tokens), F.gelu(module.proj(tokens)))
    assert not fused.calls
    module.approximate = "tanh"
    monkeypatch.setattr(fused_gelu, "_FUSED", None)
    assert_same(module, 0)


@pytest.fixture
def operator():
    """The operator on this device, by the function that stands for the GPU's."""
    torch._dynamo.reset()
    with torch.library._scoped_library("lintra", "IMPL") as library:
        library.impl("linear_gelu", fused_gelu._linear_gelu, "CPU")
        yield torch.ops.lintra.linear_gelu.default


def test_operator(module, operator):
    arguments = (torch.randn(2, 3, 8), torch.randn(32, 8), torch.randn(32))
    torch.library.opcheck(operator, arguments)


def test_compiled_inference_takes_one_call(module, operator):
    compiled = torch.compile(module, fullgraph=True)
    assert_same(compiled, 1)
    assert_same(compiled, 1, torch.randn(2, 5, 8, dtype=torch.bfloat16))
    assert_same(compiled, 1, torch.randn(2, 7, 8, dtype=torch.bfloat16))  # dynamic
    exported = torch.export.export(module, (torch.randn(2, 3, 8, dtype=torch.bfloat16),))
    assert "linear_gelu" not in str(exported.graph)  # fake weights are no parameters
    module.proj.register_forward_pre_hook(lambda *_: None)
    torch._dynamo.reset()  # torch.compile does not hear of hooks that come later
    assert_same(compiled, 0)


@pytest.mark.parametrize(
    "kind", ["before", "after", "accelerate", "adapter", "no_bias", "subclass"]
)
def test_hooks_and_adapters_are_heard(module, kind):
    linear, seen = module.proj, []
    if kind == "before":
        linear.register_forward_pre_hook(lambda *_: seen.append(kind))
    elif kind == "after":
        linear.register_forward_hook(lambda *_: seen.append(kind))
    elif kind == "accelerate":
        hook = ModelHook()
        hook.pre_forward = lambda _, *args, **kwargs: (seen.append(kind), (args, kwargs))[1]
        add_hook_to_module(linear, hook)
    elif kind == "adapter":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"]), module)
        assert type(module.proj) is not nn.Linear
        module.proj.requires_grad_(False)
    elif kind == "no_bias":
        linear.bias = None
    else:
        module.proj = type("Other", (nn.Linear,), {})(8, 32, dtype=torch.bfloat16)
        module.requires_grad_(False)
    assert_same(module, 0)
    assert len(seen) == 2 * (kind in ("before", "after", "accelerate"))


def test_feed_forward_layers_keep_their_names():
    for activation, kind in [("gelu-approximate", FusedGELU), ("gelu", GELU), ("geglu", None)]:
        layer = FeedForward(8, activation_fn=activation)
        names, tokens = list(layer.state_dict()), torch.randn(2, 3, 8)
        expected = layer(tokens)
        fuse_gelu(layer)
        assert kind is None or type(layer.net[0]) is kind
        assert list(layer.state_dict()) == names
        assert torch.equal(layer(tokens), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [(1152, 4608), (9, 35)], ids=str)  # cuBLASLt takes the first
def test_gpu(dtype, width):
    module = FusedGELU(GELU(*width, approximate="tanh")).to("cuda", dtype)
    tokens = torch.randn(2, 197, width[0], device="cuda", dtype=dtype)
    with torch.no_grad():
        assert fused_gelu.fuses_gelu(module.proj, tokens)
        ours, two = module(tokens), F.gelu(module.proj(tokens), approximate="tanh")
        assert torch.equal(torch.compile(module, fullgraph=True)(tokens), ours)
        exact = module.double().gelu(module.proj(tokens.double()))
    error, allowed = (float((x.double() - exact).abs().max()) for x in (ours, two))
    assert error <= 1.5 * allowed + torch.finfo(dtype).eps
