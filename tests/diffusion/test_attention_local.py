"""The processor of CLEAR by itself: in a stock model, its scale and its messages."""

import inspect
import math

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxPosEmbed
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lintra.diffusion.attention import local, rotary
from lintra.diffusion.attention.local import ClearAttnProcessor, proportional_attention_scale
from lintra.diffusion.attention.rotary import normalize_and_rotate, rotate
from lintra.kernels import rotary_rms_norm
from tiny_clear import DenseOracle, clear_inputs, tiny_stock


def test_one_processor_serves_a_stock_model():
    inputs, kwargs = clear_inputs("flux", (6, 7)), {"spatial_shape": (6, 7), "radius": 4}
    stock = tiny_stock("flux")
    with DenseOracle("flux", (6, 7), 4), torch.no_grad():
        expected = stock(**inputs).sample
    stock.set_attn_processor(ClearAttnProcessor())
    with torch.no_grad():
        out = stock(**inputs, joint_attention_kwargs=kwargs).sample
    torch.testing.assert_close(out, expected)


def test_proportional_scale_is_its_definition():
    assert proportional_attention_scale(4608, 128) == pytest.approx(128**-0.5, rel=1e-12)
    n = 512 + 256 * 256
    expected = math.sqrt(math.log(n) / math.log(4608) / 64)
    assert proportional_attention_scale(n, 64) == pytest.approx(expected, rel=1e-12)
    assert proportional_attention_scale(n, 64, pooled=True) == pytest.approx(
        math.sqrt(math.log(10 * n) / math.log(4608) / 64), rel=1e-12
    )


def test_pooling_starts_as_a_mean():
    processor = ClearAttnProcessor(down_factor=2)
    assert processor.spatial_weight.shape == (1, 1, 1, 2, 1, 2, 1)
    tokens = torch.randn(2, 24, 3, 5)
    mean = tokens.unflatten(1, (2, 2, 3, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(processor.forward(tokens, (4, 6)), mean)


def test_names_and_devices():
    processor = ClearAttnProcessor(down_factor=4, device="meta", dtype=torch.bfloat16)
    assert list(processor.state_dict()) == ["spatial_weight"]
    assert processor.spatial_weight.is_meta
    assert processor.spatial_weight.dtype == torch.bfloat16
    assert "down_factor=4, full_attention=False" in repr(processor)


def test_errors():
    attention = FluxAttention(8, heads=1, dim_head=8, pre_only=True, bias=True)
    attention.set_processor(ClearAttnProcessor())
    x = torch.zeros(1, 12, 8)
    with pytest.raises(ValueError, match=r"`spatial_shape` must be \(h, w\) in joint.*, got None"):
        attention(x, radius=2)
    with pytest.raises(ValueError, match=r"`radius` must be a number in joint.*, got None"):
        attention(x, spatial_shape=(3, 4))
    with pytest.raises(ValueError, match=r"`spatial_shape` must fit into the 12 tokens, got 4 x 4"):
        attention(x, spatial_shape=(4, 4), radius=2)
    with pytest.raises(ValueError, match="`attention_mask` must be None"):
        attention(x, attention_mask=torch.ones(12, 12), spatial_shape=(3, 4), radius=2)
    with pytest.raises(ValueError, match="`radius` must be at least 1, got 0"):
        attention(x, spatial_shape=(3, 4), radius=0)
    attention.set_processor(ClearAttnProcessor(down_factor=2))
    with pytest.raises(ValueError, match="down factor 2 divides, got 3 x 4"):
        attention(x, spatial_shape=(3, 4), radius=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotary_positions_are_those_of_diffusers(dtype):
    query, key = torch.randn(2, 2, 7, 3, 16, dtype=dtype).requires_grad_().unbind()
    tables = FluxPosEmbed(10000, (4, 6, 6))(torch.randint(300, (7, 3)).float())
    expected = [apply_rotary_emb(x, tables, sequence_dim=1) for x in (query, key)]
    rotated = rotate(query, key, tables)
    for mine, theirs, x in zip(rotated, expected, (query, key), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs)
        # In half precision diffusers also rounds one summand of the gradient.
        exact = apply_rotary_emb(x.float(), tables, sequence_dim=1)
        (grad,), (wanted,) = (
            torch.autograd.grad(y.sum(), x, retain_graph=True) for y in (mine, exact)
        )
        torch.testing.assert_close(grad, wanted)


def test_compiled_rotary_positions_have_no_complex_numbers():
    tables = FluxPosEmbed(10000, (4, 6, 6))(torch.arange(15).reshape(5, 3).float())
    x = torch.randn(1, 5, 2, 16)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k: rotate(q, k, tables), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, x), rotate(x, x, tables))
    assert "complex" not in graphs[0].code


@pytest.fixture
def launches(monkeypatch):
    """Takes this device for a GPU; the calls of the operation that has a kernel there."""
    calls = []

    def operation(*args, **kwargs):
        calls.append(args)
        return rotary_rms_norm(*args, **kwargs)

    monkeypatch.setattr(rotary, "on_gpu", lambda _: True)
    monkeypatch.setattr(rotary, "rotary_rms_norm", operation)
    return calls


def norms_and_tokens(dtype=torch.bfloat16):
    norms = [nn.RMSNorm(16, eps=1e-6, dtype=dtype).requires_grad_(False) for _ in range(2)]
    for norm in norms:
        norm.weight.normal_()
    tables = FluxPosEmbed(10000, (4, 6, 6))(torch.randint(300, (7, 3)).float())
    return norms, torch.randn(2, 2, 7, 3, 16, dtype=dtype), tables


def test_inference_on_a_gpu_takes_one_pass(launches):
    norms, (query, key), tables = norms_and_tokens()
    ours = normalize_and_rotate([(query, key, *norms)], tables)
    assert len(launches) == 1
    for out, x, norm in zip(ours, (query, key), norms, strict=True):
        assert out.dtype == x.dtype
        exact = F.rms_norm(x.double(), (16,), norm.weight.double(), 1e-6)
        torch.testing.assert_close(out, apply_rotary_emb(exact, tables, sequence_dim=1).to(x.dtype))
    query.requires_grad_()
    parts = [[x[:, part] for x in (query, key)] + norms for part in (slice(2), slice(2, None))]
    with torch.no_grad():
        joined = normalize_and_rotate(parts, tables)
    assert len(launches) == 3
    assert all(torch.equal(x, y) for x, y in zip(joined, ours, strict=True))


def test_gradients_on_a_gpu_take_one_pass(launches):
    norms, (query, key), tables = norms_and_tokens(torch.float32)
    leaves = [query.requires_grad_(), key.requires_grad_()]
    leaves += [norm.weight.requires_grad_() for norm in norms]
    pairs = []
    for fused in (True, False):
        parts = [[x[:, part] for x in (query, key)] + norms for part in (slice(2), slice(2, None))]
        if fused:
            out = normalize_and_rotate(parts, tables)
        else:
            tokens = [norm(x) for norm, x in zip(norms, (query, key), strict=True)]
            out = [apply_rotary_emb(x, tables, sequence_dim=1) for x in tokens]
        loss = sum(x.sin().sum() for x in out)
        pairs.append(torch.autograd.grad(loss, leaves))
    assert len(launches) == 2
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hook", "subclass", "eps", "no norm", "no tables"])
def test_what_only_several_passes_can_do(launches, kind):
    norms, (query, key), tables = norms_and_tokens(torch.float32)
    seen = []
    if kind == "hook":
        norms[0].register_forward_pre_hook(lambda *_: seen.append(1))
    elif kind == "subclass":
        norms[0] = type("Other", (nn.RMSNorm,), {})(16, eps=1e-6).requires_grad_(False)
    elif kind == "eps":
        norms[1].eps = 1e-5
    elif kind == "no norm":
        norms = [None, None]
    else:
        tables = None
    ours = normalize_and_rotate([(query, key, *norms)], tables)
    assert not launches
    assert len(seen) == (kind == "hook")
    for out, x, norm in zip(ours, (query, key), norms, strict=True):
        normed = x if norm is None else norm(x)
        expected = normed if tables is None else apply_rotary_emb(normed, tables, sequence_dim=1)
        torch.testing.assert_close(out, expected)


def count_passes(attention, *inputs, **kwargs):
    """Copies, concatenations and sums, each of which reads and writes whole tensors."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as record:
        attention(*inputs, **kwargs)
    names = ("aten::copy_", "aten::cat", "aten::clone", "aten::add", "aten::add_", "aten::mul")
    return sum(event.count for event in record.key_averages() if event.key in names)


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_makes_fewer_passes_than_the_stock_processor(batch, monkeypatch):
    """But for attention itself, whose reference copies as it likes."""
    attention = tiny_stock("flux").to(torch.bfloat16).transformer_blocks[0].attn
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        setattr(attention, name, torch.nn.Identity())  # many passes each on a CPU
    image, text = (torch.randn(batch, count, 32).to(torch.bfloat16) for count in (12, 5))
    tables = FluxPosEmbed(10000, (4, 6, 6))(torch.zeros(17, 3))
    stock = count_passes(attention, image, text, image_rotary_emb=tables)
    attention.set_processor(ClearAttnProcessor())
    monkeypatch.setattr(local, "local_attention", lambda query, *_, **__: torch.empty_like(query))
    options = {"spatial_shape": (3, 4), "radius": 2}
    ours = count_passes(attention, image, text, image_rotary_emb=tables, **options)
    assert ours <= stock - 6


def test_the_signature_that_diffusers_reads_is_made_once():
    made = ClearAttnProcessor.__call__.__signature__
    read = inspect.signature(ClearAttnProcessor().__call__)
    assert list(read.parameters) == list(made.parameters)[1:]  # without self
    assert {"attn", "spatial_shape", "radius", "rotary_emb"} <= set(read.parameters)
    assert read.parameters["radius"] is made.parameters["radius"]
