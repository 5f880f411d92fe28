"""Linear attention with a local term: launched as one, it is its three operations."""

import pytest
import torch
from torch import Tensor

from kernel_checks import DEVICE, on_gpu_or_interpreted, poisoned
from lintra.kernels import FilterMlp, linear_attention, linear_attention_conv2d, token_conv2d
from lintra.kernels._common.plans import Plans
from lintra.kernels.linear_attention_conv import api

__all__ = ["poisoned"]
BATCH, GRID, HEADS, HEAD_DIM, PREFIX = 2, (3, 4), 2, 8, 1
CHANNELS = HEADS * HEAD_DIM
INLINE = {"feature_map": "identity", "normalizer": "covariance"}
OPTIONS = {"grid": GRID, "num_prefix_tokens": PREFIX}


def qkv_of(batch: int = BATCH) -> list[Tensor]:
    tokens = GRID[0] * GRID[1] + PREFIX
    projected = torch.randn(batch, tokens, 3, HEADS, HEAD_DIM, device=DEVICE)
    return list(projected.unbind(2))


def mlp_of(batch: int = BATCH, size: int = 3) -> FilterMlp:
    shapes = (batch, CHANNELS), (CHANNELS, HEAD_DIM, 1), (CHANNELS,)
    outputs = size**2 * CHANNELS
    shapes += (outputs, HEAD_DIM, 1), (outputs,)
    return FilterMlp(*(torch.randn(*shape, device=DEVICE) for shape in shapes), HEADS, size)


def filters_of(kind: str, batch: int = BATCH) -> Tensor | FilterMlp:
    if kind == "made":
        return mlp_of(batch)
    shape = {"shared": (HEAD_DIM, 5, 5), "own": (CHANNELS, 3, 3), "sample": (batch, CHANNELS, 3, 3)}
    return torch.randn(*shape[kind], device=DEVICE)


def by_three(q: Tensor, k: Tensor, v: Tensor, weight, bias, **attention) -> Tensor:
    out = linear_attention(q, k, v, **attention).flatten(2)
    weight = weight.filters() if isinstance(weight, FilterMlp) else weight
    return token_conv2d(v.flatten(2), weight, bias, residual=out, **OPTIONS)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[api._Plan]:
    """As on a GPU; the plans that were launched."""
    made = []

    def launched(plan: api._Plan, *arguments) -> Tensor:
        made.append(plan)
        return launch(plan, *arguments)

    launch = api._launched
    monkeypatch.setattr(api, "_launched", launched)
    monkeypatch.setattr(api, "_PLANS", Plans(api._plan))
    for each in (api.attention_api, api.conv_api, api.mlp_api):
        monkeypatch.setattr(each, "CALLS", Plans(each._checked))
        monkeypatch.setattr(each, "takes_kernel", lambda impl, x, reason: reason is None)
    return made


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["shared", "own", "sample", "made"])
@pytest.mark.parametrize("attention", [INLINE, {}], ids=["inline", "sla"])
def test_it_is_the_three_operations(launches, kind, attention):
    for biased in (False, True, True):  # planned, planned, remembered
        q, k, v = qkv_of()
        weight = filters_of(kind)
        filters = CHANNELS if kind == "made" else weight.shape[-3]
        bias = torch.randn(filters, device=DEVICE) if biased else None
        out = linear_attention_conv2d(q, k, v, weight, bias, **OPTIONS, **attention)
        assert torch.equal(out, by_three(q, k, v, weight, bias, **attention))
    assert len(launches) == 3
    assert launches[1] is launches[2]


@on_gpu_or_interpreted
def test_other_layouts_are_composed(launches):
    q, k, v = qkv_of()
    apart = torch.randn(BATCH, HEADS, v.shape[1], HEAD_DIM, device=DEVICE).transpose(1, 2)
    weight, bias = filters_of("own"), torch.randn(2 * CHANNELS, device=DEVICE)[::2]
    for value, shift in ((apart, None), (v, bias)):
        out = linear_attention_conv2d(q, k, value, weight, shift, **OPTIONS)
        assert torch.equal(out, by_three(q, k, value, weight, shift))
    assert linear_attention_conv2d(*qkv_of(0), mlp_of(0), **OPTIONS).shape == (0, 13, CHANNELS)
    assert not launches


@on_gpu_or_interpreted
@pytest.mark.parametrize("kind", ["own", "made"])
def test_gradients_are_those_of_the_three(launches, kind):
    inputs = [x.requires_grad_() for x in qkv_of()]
    weight = filters_of(kind)
    out = linear_attention_conv2d(*inputs, weight, **OPTIONS, **INLINE)
    expected = by_three(*inputs, weight, None, **INLINE)
    d_out = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, d_out),
        torch.autograd.grad(expected, inputs, d_out),
        strict=True,
    ):
        assert torch.equal(got, want)
    assert not launches
    with torch.no_grad():
        assert torch.equal(linear_attention_conv2d(*inputs, weight, **OPTIONS, **INLINE), out)
    assert len(launches) == 1


@pytest.mark.parametrize("kind", ["own", "made"])
def test_compiles_without_breaks(kind):
    q, k, v = qkv_of()
    weight = filters_of(kind)

    def run(q: Tensor) -> Tensor:
        return linear_attention_conv2d(q, k, v, weight, **OPTIONS, **INLINE)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), run(q))


def test_errors_are_those_of_the_operations():
    q, k, v = qkv_of()
    with pytest.raises(ValueError, match="`grid` must hold the 13 tokens"):
        linear_attention_conv2d(q, k, v, filters_of("own"), grid=GRID)
    with pytest.raises(ValueError, match="`normalizer` must be one of"):
        linear_attention_conv2d(q, k, v, mlp_of(), normalizer="sum", **OPTIONS)
    with pytest.raises(TypeError, match="`key` must have dtype"):
        linear_attention_conv2d(q, k.double(), v, filters_of("own"), **OPTIONS)
    mlp = mlp_of()._replace(size=5)
    with pytest.raises(ValueError, match="`weight2` must make filters of 5 x 5, got 144 outputs"):
        linear_attention_conv2d(q, k, v, mlp, **OPTIONS)
