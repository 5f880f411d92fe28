"""Linear attention with a local term: launched as one, it is its three operations."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kernel_checks import DEVICE, on_gpu_or_interpreted, poisoned
from lintra.kernels import FilterMlp, linear_attention, linear_attention_conv2d, token_conv2d
from lintra.kernels._common.plans import Plans
from lintra.kernels.linear_attention_conv import api, launches

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
def made(monkeypatch: pytest.MonkeyPatch) -> list[launches._Plan]:
    """As on a GPU; the plans that were launched."""
    made = []

    def launched(plan: launches._Plan, *arguments) -> Tensor:
        made.append(plan)
        return launch(plan, *arguments)

    launch = launches.launched
    monkeypatch.setattr(launches, "launched", launched)
    monkeypatch.setattr(launches, "PLANS", Plans(launches._plan))
    monkeypatch.setattr(api, "_is_one_operator", lambda *_: True)
    for each in (launches.attention_api, launches.conv_api, launches.mlp_api):
        monkeypatch.setattr(each, "CALLS", Plans(each._checked))
        monkeypatch.setattr(each, "takes_kernel", lambda impl, x, reason: reason is None)
    return made


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["shared", "own", "sample", "made"])
@pytest.mark.parametrize("attention", [INLINE, {}], ids=["inline", "sla"])
def test_it_is_the_three_operations(made, kind, attention):
    for biased in (False, True, True):  # planned, planned, remembered
        q, k, v = qkv_of()
        weight = filters_of(kind)
        filters = CHANNELS if kind == "made" else weight.shape[-3]
        bias = torch.randn(filters, device=DEVICE) if biased else None
        out = linear_attention_conv2d(q, k, v, weight, bias, **OPTIONS, **attention)
        assert torch.equal(out, by_three(q, k, v, weight, bias, **attention))
    assert len(made) == 3
    assert made[1] is made[2]


@on_gpu_or_interpreted
def test_other_layouts_are_composed(made):
    q, k, v = qkv_of()
    apart = torch.randn(BATCH, HEADS, v.shape[1], HEAD_DIM, device=DEVICE).transpose(1, 2)
    weight, bias = filters_of("own"), torch.randn(2 * CHANNELS, device=DEVICE)[::2]
    for value, shift in ((apart, None), (v, bias)):
        out = linear_attention_conv2d(q, k, value, weight, shift, **OPTIONS)
        assert torch.equal(out, by_three(q, k, value, weight, shift))
    assert linear_attention_conv2d(*qkv_of(0), mlp_of(0), **OPTIONS).shape == (0, 13, CHANNELS)
    assert not made


def gradients(function, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    wanted = [x for x in inputs if x.requires_grad]
    return list(torch.autograd.grad(function(), wanted, d_out))


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["shared", "own", "sample", "made"])
@pytest.mark.parametrize("attention", [INLINE, {}], ids=["inline", "sla"])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_those_of_the_three(made, kind, attention, biased):
    inputs, weight = qkv_of(), filters_of(kind)
    bias = torch.randn(CHANNELS if kind == "made" else weight.shape[-3], device=DEVICE)
    bias = bias if biased else None
    inputs += [*(weight[:5] if kind == "made" else [weight]), *([bias] if biased else [])]
    for x in inputs:
        x.requires_grad_()
    d_out = torch.randn(BATCH, inputs[0].shape[1], CHANNELS, device=DEVICE)
    got = gradients(
        lambda: linear_attention_conv2d(*inputs[:3], weight, bias, **OPTIONS, **attention),
        inputs,
        d_out,
    )
    want = gradients(lambda: by_three(*inputs[:3], weight, bias, **attention), inputs, d_out)
    for name, x, y in zip(("query", "key"), got, want, strict=False):
        assert torch.equal(x, y), name
    torch.testing.assert_close(got, want)  # values have the sum of two, rounded once
    assert not made
    with torch.no_grad():
        out = linear_attention_conv2d(*inputs[:3], weight, bias, **OPTIONS, **attention)
        assert torch.equal(out, by_three(*inputs[:3], weight, bias, **attention))
    assert len(made) == 1


@on_gpu_or_interpreted
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (0, 3), (2, 4)], ids=str)
def test_only_what_is_asked_for_has_a_gradient(made, needed):
    inputs = [*qkv_of(), filters_of("shared"), torch.randn(HEAD_DIM, device=DEVICE)]
    for index in needed:
        inputs[index].requires_grad_()
    d_out = torch.randn(BATCH, inputs[0].shape[1], CHANNELS, device=DEVICE)
    got = gradients(lambda: linear_attention_conv2d(*inputs, **OPTIONS), inputs, d_out)
    torch.testing.assert_close(got, gradients(lambda: by_three(*inputs), inputs, d_out))


@on_gpu_or_interpreted
def test_values_gradients_are_added_by_the_kernel(made):
    """One node, and no pass over the tokens between the kernels."""
    inputs = [x.requires_grad_() for x in [*qkv_of(), filters_of("shared")]]
    out = linear_attention_conv2d(*inputs, **OPTIONS)
    assert {type(x).__name__ for x, _ in out.grad_fn.next_functions if x} == {"AccumulateGrad"}
    with torch.profiler.profile() as profile:
        out.backward(torch.randn_like(out))
    names = {event.name for event in profile.events()}
    assert any("token_conv2d_bwd_tokens" in name for name in names)
    assert not names & {"aten::add", "aten::add_"}


@on_gpu_or_interpreted
def test_there_is_one_derivative(made):
    inputs = [x.requires_grad_() for x in [*qkv_of(), filters_of("shared")]]
    out = linear_attention_conv2d(*inputs, **OPTIONS)
    (grad,) = torch.autograd.grad(out.sum(), inputs[2], create_graph=True)
    with pytest.raises(NotImplementedError, match="must be differentiated only once"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", ["own", "made"])
def test_compiles_without_breaks(kind):
    q, k, v = qkv_of()
    weight = filters_of(kind)

    def run(q: Tensor) -> Tensor:
        return linear_attention_conv2d(q, k, v, weight, **OPTIONS, **INLINE)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), run(q))


@on_gpu_or_interpreted
@pytest.mark.parametrize("kind", ["shared", "sample", "made"])
def test_a_graph_holds_one_operator(made, kind):
    """Of any length of tokens, without a gradient; with one the three are in it."""
    weight = filters_of(kind)
    bias = None if kind == "made" else torch.randn(weight.shape[-3], device=DEVICE)
    counted = CompileCounterWithBackend("aot_eager")

    def run(q: Tensor, k: Tensor, v: Tensor, height: int) -> Tensor:
        grid = (height, GRID[1])
        return linear_attention_conv2d(q, k, v, weight, bias, grid=grid, **INLINE)

    compiled = torch.compile(run, fullgraph=True, backend=counted, dynamic=True)
    graphs = set()
    for height in (3, 5):
        tokens = height * GRID[1]
        q, k, v = torch.randn(BATCH, tokens, 3, HEADS, HEAD_DIM, device=DEVICE).unbind(2)
        with torch.no_grad():
            assert torch.equal(compiled(q, k, v, height), run(q, k, v, height))
        graphs.add(counted.frame_count)
    assert len(graphs) == 1
    targets = [node.target for node in counted.graphs[-1].graph.nodes if node.op != "placeholder"]
    assert torch.ops.lintra.linear_attention_conv2d_fwd.default in targets
    assert not any("linear_attention_fwd" in str(target) for target in targets)
    assert len(made) == 4  # twice in a graph
    leaf = q.clone().requires_grad_()
    (got,) = torch.autograd.grad(compiled(leaf, k, v, height).sum(), leaf)
    assert torch.equal(got, torch.autograd.grad(run(leaf, k, v, height).sum(), leaf)[0])
    assert len(made) == 4


@on_gpu_or_interpreted
@pytest.mark.parametrize("kind", ["shared", "made"])
def test_the_operator(kind):
    weight = filters_of(kind)
    q, k, v = qkv_of()
    rest, groups, size = (
        (list(weight[:5]), *weight[5:]) if kind == "made" else ([weight], None, None)
    )
    options = ("relu", "ratio", 1e-6, *GRID, PREFIX, groups, size)
    operator = torch.ops.lintra.linear_attention_conv2d_fwd.default
    torch.library.opcheck(operator, (q, k, v, None, rest, *options))
    out = operator(q, k, v, None, rest, *options)
    assert torch.equal(out, by_three(q, k, v, weight, None))


def test_errors_are_those_of_the_operations():
    q, k, v = qkv_of()
    with pytest.raises(ValueError, match="`grid` must hold the 13 tokens"):
        linear_attention_conv2d(q, k, v, filters_of("own"), grid=GRID)
    with pytest.raises(ValueError, match="`normalizer` must be one of"):
        linear_attention_conv2d(q, k, v, mlp_of(), normalizer="sum", **OPTIONS)
    with pytest.raises(TypeError, match="`key` must have dtype"):
        linear_attention_conv2d(q, k.double(), v, filters_of("own"), **OPTIONS)
    with pytest.raises(TypeError, match="`query` must be a tensor, got list"):
        linear_attention_conv2d([q], k, v, filters_of("own"), **OPTIONS)
    with pytest.raises(ValueError, match=r"`residual` must have shape \(B, N, C\)"):
        linear_attention_conv2d(q[:, 1:].requires_grad_(), k, v, filters_of("own"), **OPTIONS)
    mlp = mlp_of()._replace(size=5)
    with pytest.raises(ValueError, match="`weight2` must make filters of 5 x 5, got 144 outputs"):
        linear_attention_conv2d(q, k, v, mlp, **OPTIONS)
