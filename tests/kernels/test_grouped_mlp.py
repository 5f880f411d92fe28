"""The grouped MLP: the convolutions it stands for, the Triton kernel against them, the contract."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_checks import DEVICE, on_gpu_or_interpreted, poisoned
from lintra.kernels import grouped_mlp
from lintra.kernels.grouped_mlp import api
from lintra.kernels.grouped_mlp.reference import grouped_mlp_reference
from lintra.kernels.grouped_mlp.triton_fwd import _block

__all__ = ["poisoned"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, G, channels, hidden units and outputs of a group.
SHAPES = [(1, 1, 1, 1, 1), (17, 3, 24, 24, 216), (3, 2, 96, 20, 65), (33, 2, 16, 33, 64)]


def inputs_of(batch, groups, channels, hidden, outputs, dtype=torch.float32, parameters=None):
    """Weights that keep the size of numbers; values of InLine's size."""
    x = torch.randn(batch, groups * channels).to(DEVICE, dtype)
    weight1 = torch.randn(groups * hidden, channels, 1) / channels**0.5
    weight2 = torch.randn(groups * outputs, hidden, 1) / hidden**0.5
    rest = (weight1, torch.randn(len(weight1)), weight2, torch.randn(len(weight2)))
    return x, *(parameter.to(DEVICE, parameters or dtype) for parameter in rest)


def textbook(x, weight1, bias1, weight2, bias2, groups):
    hidden = F.gelu(F.conv1d(x[..., None], weight1, bias1, groups=groups))
    return F.conv1d(hidden, weight2, bias2, groups=groups).squeeze(-1)


def assert_close_to_textbook(out: Tensor, inputs: tuple[Tensor, ...], groups: int) -> None:
    """What the textbook form errs by when all of it is in the dtype of x, and its rounding."""
    dtype = inputs[0].dtype
    exact = textbook(*(t.to(dtype).double() for t in inputs), groups)
    assert out.dtype == dtype
    assert out.shape == exact.shape
    error = (out.double() - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("parameters", [None, torch.float32])
def test_textbook(dtype, parameters):
    inputs = inputs_of(5, 3, 8, 6, 18, dtype, parameters)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = grouped_mlp(*inputs, groups=3, impl="reference")
    assert_close_to_textbook(out, inputs, 3)
    assert torch.equal(out, grouped_mlp(*inputs, groups=3, impl="reference"))


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape):
    inputs = inputs_of(*shape)
    out = grouped_mlp(*inputs, groups=shape[1], impl="triton")
    assert_close_to_textbook(out, inputs, shape[1])


@on_gpu_or_interpreted
def test_many_samples_share_a_program(monkeypatch):
    from lintra.kernels.grouped_mlp import triton_fwd

    monkeypatch.setattr(triton_fwd, "_WAVES", 0)
    inputs = inputs_of(70, 2, 5, 5, 9)
    assert_close_to_textbook(grouped_mlp(*inputs, groups=2, impl="triton"), inputs, 2)


@on_gpu_or_interpreted
def test_a_sample_is_alone_with_its_nan():
    inputs = inputs_of(4, 2, 5, 6, 7)
    expected = grouped_mlp(*inputs, groups=2, impl="triton")
    inputs[0][1, :5] = float("nan")
    out = grouped_mlp(*inputs, groups=2, impl="triton")
    assert out[1, :7].isnan().all()
    assert torch.equal(out[1, 7:], expected[1, 7:])
    others = [0, 2, 3]
    assert torch.equal(out[others], expected[others])


@on_gpu_or_interpreted
def test_strided_and_empty_samples():
    x, *rest = inputs_of(6, 2, 8, 8, 5)
    view = x.t().contiguous().t()[::2]
    assert_close_to_textbook(grouped_mlp(view, *rest, groups=2, impl="triton"), (view, *rest), 2)
    for impl in ("triton", "reference"):
        assert grouped_mlp(x[:0], *rest, groups=2, impl=impl).shape == (0, 10)


@on_gpu_or_interpreted
def test_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.lintra.grouped_mlp_fwd.default, (*inputs_of(2, 2, 3, 4, 5), 2))


@on_gpu_or_interpreted
def test_a_gradient_takes_the_reference():
    inputs = inputs_of(3, 2, 4, 5, 6, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: grouped_mlp(*x, groups=2), leaves)
    leaves = [x.detach().float().requires_grad_() for x in inputs]
    with pytest.raises(NotImplementedError, match="`impl` must not be .* has no gradient"):
        grouped_mlp(*leaves, groups=2, impl="triton")
    with torch.no_grad():
        out = grouped_mlp(*leaves, groups=2, impl="triton")
        torch.testing.assert_close(out, grouped_mlp_reference(*leaves, 2))


@on_gpu_or_interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_without_a_graph_break(impl):
    torch._dynamo.reset()

    def run(*inputs):
        return grouped_mlp(*inputs, groups=2, impl=impl)

    inputs = inputs_of(2, 2, 3, 4, 5)
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), run(*inputs))


def test_meta_tensors_have_the_shape():
    inputs = [x.to("meta") for x in inputs_of(2, 2, 3, 4, 5)]
    for impl in ("reference", "triton"):
        assert grouped_mlp(*inputs, groups=2, impl=impl).shape == (2, 10)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_auto_takes_the_kernel_where_no_gradient_is_asked_for(monkeypatch, requires_grad):
    calls = []
    monkeypatch.setattr(api, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr(api, "takes_kernel", lambda impl, x, reason: reason is None)  # a GPU
    monkeypatch.setattr(api, "CALLS", api._checked)
    monkeypatch.setattr(api, "grouped_mlp_triton", lambda *inputs: calls.append(inputs))
    x, *rest = inputs_of(2, 2, 3, 4, 5)
    grouped_mlp(x, rest[0].requires_grad_(requires_grad), *rest[1:], groups=2)
    assert len(calls) == (not requires_grad)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (256, 6, 32, 32, 288), (5000, 2, 48, 48, 432)], ids=str)
def test_kernel_on_gpu(dtype, parameters, shape):
    inputs = inputs_of(*shape, dtype, parameters)
    out = grouped_mlp(*inputs, groups=shape[1], impl="triton")
    assert_close_to_textbook(out, inputs, shape[1])


def test_blocks_hold_their_width():
    assert [_block(width) for width in (1, 16, 17, 32, 96, 128)] == [16, 16, 32, 32, 128, 128]


X = torch.zeros(2, 8)
PARAMETERS = {
    "weight1": torch.zeros(6, 4, 1), "bias1": torch.zeros(6),
    "weight2": torch.zeros(10, 3, 1), "bias2": torch.zeros(10),
}  # fmt: skip
WIDE = {
    "x": torch.zeros(2, 258), "weight1": torch.zeros(6, 129, 1), "impl": "triton",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "`x` must be float16, .* got torch.int32"),
        ({"x": X[None]}, ValueError, r"`x` must have shape \(B, C\), got \(1, 2, 8\)"),
        ({"x": None}, TypeError, "`x` must be a tensor, got NoneType"),
        ({"weight1": X}, ValueError, r"`weight1` must have shape \(M, C / G, 1\), got \(2, 8\)"),
        ({"weight1": torch.zeros(6, 3, 1)}, ValueError, r"`weight1` .* = \(6, 4, 1\), got \(6, 3"),
        ({"weight2": torch.zeros(10, 3, 2)}, ValueError, r"`weight2` .* = \(10, 3, 1\), got"),
        ({"bias1": torch.zeros(5)}, ValueError, r"`bias1` must have shape \(M\) = \(6,\), got"),
        ({"bias2": torch.zeros(10).int()}, TypeError, "`bias2` must be float16, .* torch.int32"),
        ({"bias2": torch.zeros(10, device="meta")}, ValueError, "`bias2` must be on cpu, got meta"),
        ({"groups": 0}, ValueError, "`groups` must be 1 or more and divide 8 chan.* got 0"),
        ({"groups": 4}, ValueError, "divide 8 channels, 6 hidden, 10 outputs, got 4"),
        ({"impl": "cuda"}, ValueError, "`impl` must be one of auto, .* got 'cuda'"),
        ({"impl": "triton", "x": X.double()}, NotImplementedError, "`impl` must not be 'triton'"),
        (WIDE, NotImplementedError, "`impl` must not be 'triton' for grouped_mlp: its kernel"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        grouped_mlp(**{"x": X, **PARAMETERS, "groups": 2} | changes)
