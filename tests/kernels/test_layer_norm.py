"""Layer normalisation: the textbook form, the Triton kernel against it, and the contract."""

import pytest
import torch
from torch.nn import functional as F

from kernel_checks import DEVICE, on_gpu_or_interpreted, poisoned
from lintra.kernels import layer_norm
from lintra.kernels.layer_norm import api

__all__ = ["poisoned"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs_of(*shape, dtype=torch.float32, parameters=None):
    x = (3 * torch.randn(*shape) + 5).to(DEVICE, dtype)
    weight, bias = (torch.randn(shape[-1]).to(DEVICE, parameters or dtype) for _ in range(2))
    return x, weight, bias


def textbook(x, weight, bias, eps=1e-6):
    x, weight, bias = x.double(), weight.double(), bias.double()
    deviation = x - x.mean(-1, keepdim=True)
    return deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def assert_close_to_textbook(out, x, weight, bias):
    exact = textbook(x, weight, bias)
    assert out.dtype == x.dtype
    error = (out.double() - exact).abs().max()
    assert error <= 4 * torch.finfo(x.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("parameters", [None, torch.float32])
def test_textbook(dtype, parameters):
    inputs = inputs_of(2, 3, 5, dtype=dtype, parameters=parameters)
    assert_close_to_textbook(layer_norm(*inputs, impl="reference"), *inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert layer_norm(*inputs, impl="reference").dtype == dtype


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 12), (2, 19, 192), (257,), (2, 1, 256)], ids=str)
def test_kernel(shape):
    inputs = inputs_of(*shape)
    if shape[-1] > 256:
        with pytest.raises(NotImplementedError, match="takes 1 to 256 channels, got 257"):
            layer_norm(*inputs, impl="triton")
        return
    assert_close_to_textbook(layer_norm(*inputs, impl="triton"), *inputs)


@on_gpu_or_interpreted
def test_strided_and_empty_tokens():
    x, weight, bias = inputs_of(2, 8, 6)
    view = x.transpose(0, 1)[::2]
    assert_close_to_textbook(layer_norm(view, weight, bias, impl="triton"), view, weight, bias)
    assert layer_norm(x[:0], weight, bias, impl="triton").shape == (0, 8, 6)


@on_gpu_or_interpreted
def test_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.lintra.layer_norm_fwd.default, (*inputs_of(2, 3, 5), 1e-6))


@on_gpu_or_interpreted
def test_a_gradient_takes_the_reference():
    x, weight, bias = inputs_of(2, 3, 5)
    weight.requires_grad_()
    out = layer_norm(x, weight, bias)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    expected = F.layer_norm(x, (5,), weight, bias, 1e-6)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), weight)[0])
    with pytest.raises(NotImplementedError, match="`impl` must not be .* has no gradient"):
        layer_norm(x, weight, bias, impl="triton")
    with torch.no_grad():
        torch.testing.assert_close(layer_norm(x, weight, bias, impl="triton"), expected)


def test_compiles_without_a_graph_break():
    inputs = inputs_of(2, 3, 5)
    compiled = torch.compile(layer_norm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), layer_norm(*inputs))


def test_a_graph_traced_without_autocast_ignores_it_later():
    class Norm(torch.nn.Module):
        def forward(self, x, weight, bias):
            return layer_norm(x, weight, bias, impl="reference")

    inputs = inputs_of(2, 3, 5)
    exported = torch.export.export(Norm(), inputs).module()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = exported(*inputs)
    assert torch.equal(out, Norm()(*inputs))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [192, 256, 17])
def test_kernel_on_gpu(dtype, channels):
    inputs = inputs_of(5, 197, channels, dtype=dtype)
    assert_close_to_textbook(layer_norm(*inputs, impl="triton"), *inputs)


@pytest.mark.parametrize(("tokens", "expected"), [(api.MIN_TOKENS, 1), (api.MIN_TOKENS - 1, 0)])
def test_few_tokens_do_not_pay_for_a_launch(monkeypatch, tokens, expected):
    calls = []

    def kernel(*inputs):
        calls.append(inputs)

    monkeypatch.setattr(api, "takes_kernel", lambda *_: True)  # as on a GPU
    monkeypatch.setattr(api, "layer_norm_triton", kernel)
    layer_norm(torch.randn(1, tokens, 4), torch.ones(4), torch.zeros(4))
    assert len(calls) == expected


X, PARAMETER = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "`x` must be float16, .* got torch.int32"),
        ({"x": X.sum()}, ValueError, r"`x` must have shape \(C\), got \(\)"),
        ({"x": None}, TypeError, "`x` must be a tensor, got NoneType"),
        ({"weight": X}, ValueError, r"`weight` must have shape \(C\), got \(2, 3, 4\)"),
        ({"weight": PARAMETER[:3]}, ValueError, r"`weight` must have shape .* \(4,\), got \(3,\)"),
        ({"bias": PARAMETER[:3]}, ValueError, r"`bias` must have shape .* \(4,\), got \(3,\)"),
        ({"bias": PARAMETER.int()}, TypeError, "`bias` must be float16, .* got torch.int32"),
        ({"impl": "cuda"}, ValueError, "`impl` must be one of auto, .* got 'cuda'"),
        ({"impl": "triton", "x": X.double()}, NotImplementedError, "`impl` must not be 'triton'"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**{"x": X, "weight": PARAMETER, "bias": PARAMETER} | changes)
