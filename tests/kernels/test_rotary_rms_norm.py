"""Normalisation and rotation in one pass: textbook form, the Triton kernel against it, contract."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from torch.nn import functional as F

from kernel_checks import DEVICE, on_gpu_or_interpreted, poisoned
from lintra.kernels import rotary_rms_norm
from lintra.kernels._common.pinning import pinned
from lintra.kernels.rotary_rms_norm.configs import HEAD_DIMS, Launch, launch_of

__all__ = ["poisoned"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, N, H, D): one head of one token, a program that is not full, one that ends within a token.
SHAPES = [(1, 1, 1, 16), (2, 5, 3, 16), (3, 7, 2, 64), (1, 33, 5, 128), (2, 3, 3, 256)]


def inputs_of(batch, tokens, heads, dim, dtype=torch.float32, parameters=None):
    """Queries and keys as views of one fused projection; tables with an angle for each channel."""
    fused = (3 * torch.randn(batch, tokens, 3, heads, dim)).to(DEVICE, dtype)
    weights = (torch.randn(2, dim) + 1).to(DEVICE, parameters or dtype)
    angles = 10 * torch.rand(tokens, dim, device=DEVICE)
    return (fused[:, :, 0], fused[:, :, 1], *weights, angles.cos(), angles.sin())


def textbook(x, weight, cosines, sines, eps):
    x, weight, cosines, sines = (t.double() for t in (x, weight, cosines, sines))
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    out, cosines, sines = torch.empty_like(y), cosines[:, None], sines[:, None]
    even, odd = slice(0, None, 2), slice(1, None, 2)
    out[..., even] = y[..., even] * cosines[..., even] - y[..., odd] * sines[..., even]
    out[..., odd] = y[..., odd] * cosines[..., odd] + y[..., even] * sines[..., odd]
    return out


def assert_close_to_textbook(inputs, eps=1e-6, **options):
    query, key, query_weight, key_weight, *tables = inputs
    outs = rotary_rms_norm(*inputs, eps=eps, **options)
    for out, x, weight in zip(outs, (query, key), (query_weight, key_weight), strict=True):
        exact = textbook(x, weight, *tables, eps)
        assert out.dtype == x.dtype
        assert out.shape == x.shape
        assert out.is_contiguous()
        # Half a unit in the last place; what is not rounded at the end has the errors of its sums.
        units = 8 if x.dtype.itemsize >= 4 else 0.55
        error = (out.double() - exact).abs().max()
        assert error <= units * torch.finfo(x.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=str)
def test_textbook(dtype, parameters):
    inputs = inputs_of(2, 3, 2, 6, dtype, parameters)
    if dtype == torch.float64:
        inputs = (*inputs[:4], *(table.double() for table in inputs[4:]))
    assert_close_to_textbook(inputs, impl="reference", eps=0.25)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_close_to_textbook(inputs, impl="reference")


def test_is_what_diffusers_does():
    query, key, query_weight, key_weight, *_ = inputs_of(2, 5, 3, 16)
    tables = get_1d_rotary_pos_embed(
        16, torch.arange(5), use_real=True, repeat_interleave_real=True
    )
    tables = [table.to(DEVICE) for table in tables]
    ours = rotary_rms_norm(query, key, query_weight, key_weight, *tables, eps=1e-5)
    for out, x, weight in zip(ours, (query, key), (query_weight, key_weight), strict=True):
        normed = F.rms_norm(x, (16,), weight, 1e-5)
        torch.testing.assert_close(out, apply_rotary_emb(normed, tables, sequence_dim=1))


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape):
    assert_close_to_textbook(inputs_of(*shape), impl="triton", eps=1e-3)


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("launch", [Launch(1, 4), Launch(4, 2), Launch(64, 8)], ids=str)
def test_every_launch_gives_the_same(launch):
    with pinned(rotary_rms_norm=launch):
        assert_close_to_textbook(inputs_of(2, 5, 3, 32), impl="triton")


@on_gpu_or_interpreted
def test_any_strides_and_no_tokens():
    query, key, *parameters = inputs_of(2, 5, 4, 16)
    heads_outside = query.transpose(1, 2).contiguous().transpose(1, 2)
    no_unit = key.mT.contiguous().mT
    weights = [torch.randn(32, device=DEVICE)[::2], parameters[1]]
    assert_close_to_textbook((heads_outside, no_unit, *weights, *parameters[2:]), impl="triton")
    for few in (slice(0, 0), slice(0, 1)):
        outs = rotary_rms_norm(query[few], key[few], *parameters, impl="triton")
        assert all(out.shape == query[few].shape for out in outs)
    tables = [table[:0] for table in parameters[2:]]
    outs = rotary_rms_norm(query[:, :0], key[:, :0], *parameters[:2], *tables, impl="triton")
    assert all(out.shape == (2, 0, 4, 16) for out in outs)


@on_gpu_or_interpreted
def test_operator_passes_opcheck():
    operator = torch.ops.lintra.rotary_rms_norm_fwd.default
    torch.library.opcheck(operator, (*inputs_of(2, 3, 2, 16), 1e-6))


def gradients_of(inputs, weights, dtype=None, **options):
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in inputs[:4]]
    tables = [x if dtype is None else x.to(dtype) for x in inputs[4:]]
    outs = rotary_rms_norm(*leaves, *tables, **options)
    return torch.autograd.grad(outs, leaves, [w.to(outs[0].dtype) for w in weights])


def assert_gradients_close(inputs, **options):
    """err(kernel, float64) <= 2 err(reference, float64) + what its sums over tokens round."""
    weights = [torch.randn(inputs[0].shape, device=DEVICE) for _ in range(2)]
    ours = gradients_of(inputs, weights, **options)
    plain = gradients_of(inputs, weights, impl="reference")
    exact = gradients_of(inputs, weights, torch.float64, impl="reference")
    for x, got, same, true in zip(inputs, ours, plain, exact, strict=False):
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        allowed = 2 * (same.double() - true).abs().max()
        allowed = allowed + 4 * torch.finfo(x.dtype).eps * true.abs().max()
        assert (got.double() - true).abs().max() <= allowed


def test_gradients_of_the_reference():
    inputs = [x.double().detach().requires_grad_() for x in inputs_of(1, 2, 2, 4)]
    assert torch.autograd.gradcheck(rotary_rms_norm, inputs)


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape):
    assert_gradients_close(inputs_of(*shape), impl="triton")


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("launch", [Launch(1, 4), Launch(4, 2), Launch(64, 8)], ids=str)
def test_every_launch_gives_the_same_gradients(launch, monkeypatch):
    from lintra.kernels.rotary_rms_norm import triton_bwd

    monkeypatch.setattr(triton_bwd, "multiprocessors", lambda _: 1)  # programs of many steps
    with pinned(rotary_rms_norm=launch):
        inputs = inputs_of(2, 5, 3, 32)
        assert_gradients_close(inputs, impl="triton")
        weights = [torch.randn_like(inputs[0])] * 2  # summed in an order that is always the same
        first, second = (gradients_of(inputs, weights, impl="triton") for _ in range(2))
        assert all(map(torch.equal, first, second))


@on_gpu_or_interpreted
def test_gradients_of_any_strides_and_no_tokens():
    query, key, *parameters = inputs_of(2, 5, 4, 16)
    heads_outside = query.transpose(1, 2).contiguous().transpose(1, 2)
    no_unit = key.mT.contiguous().mT
    weights = [torch.randn(32, device=DEVICE)[::2], parameters[1].double().half()]
    assert_gradients_close((heads_outside, no_unit, *weights, *parameters[2:]), impl="triton")
    few = (query[:0], key[:0], *parameters)
    grads = gradients_of(few, [query[:0]] * 2, impl="triton")
    assert [x.shape for x in grads] == [x.shape for x in few[:4]]
    assert all(x.eq(0).all() for x in grads)


@on_gpu_or_interpreted
def test_gradients_without_an_epsilon():
    inputs = inputs_of(1, 5, 3, 64)  # a program is not full
    weights = [torch.randn_like(inputs[0])] * 2
    ours, plain = (
        gradients_of(inputs, weights, impl=impl, eps=0.0) for impl in ("triton", "reference")
    )
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@on_gpu_or_interpreted
def test_gradients_that_kernels_do_not_have():
    *inputs, sines = inputs_of(1, 2, 2, 16)
    with pytest.raises(NotImplementedError, match="no gradient of cosines and sines"):
        rotary_rms_norm(*inputs, sines.clone().requires_grad_(), impl="triton")
    rotary_rms_norm(*inputs, sines.requires_grad_())[0].sum().backward()
    assert sines.grad.isfinite().all()
    leaf = inputs[0].detach().requires_grad_()
    out, _ = rotary_rms_norm(leaf, *inputs[1:], sines.detach(), impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="`rotary_rms_norm` must be differentiated only"):
        grad.sum().backward()


@on_gpu_or_interpreted
def test_operator_of_gradients_passes_opcheck():
    inputs = inputs_of(2, 3, 2, 16)
    operator = torch.ops.lintra.rotary_rms_norm_bwd.default
    torch.library.opcheck(operator, (*inputs[:2], *inputs, 1e-6))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=str)
def test_gradients_on_gpu(dtype, parameters):
    for dim in HEAD_DIMS:
        for tokens, heads in ((197, 3), (4608, 24)):
            inputs = inputs_of(1, tokens, heads, dim, dtype, parameters)
            for _ in range(2):  # through Triton, and launched directly
                assert_gradients_close(inputs, impl="auto")


def test_a_tracer_is_given_pytorch_to_fuse(monkeypatch):
    from lintra.kernels.rotary_rms_norm import api

    def kernel(*_):
        raise AssertionError("launched")

    monkeypatch.setattr(api, "rotary_rms_norm_triton", kernel)
    monkeypatch.setattr(api, "takes_kernel", lambda *_: True)  # as on a GPU
    inputs = inputs_of(2, 3, 2, 16)
    with pytest.raises(AssertionError, match="launched"):
        rotary_rms_norm(*inputs)
    compiled = torch.compile(rotary_rms_norm, fullgraph=True, backend="eager")
    expected = api.rotary_rms_norm_reference(*inputs, 1e-6)
    torch.testing.assert_close(compiled(*inputs), expected)


def test_launches():
    expected = {16: (128, 4), 64: (32, 4), 128: (16, 4), 256: (8, 4)}
    assert {dim: (launch_of(dim).rows, launch_of(dim).warps) for dim in expected} == expected


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=str)
def test_kernel_on_gpu(dtype, parameters):
    for dim in HEAD_DIMS:
        for tokens, heads in ((197, 3), (4608, 24)):
            inputs = inputs_of(2, tokens, heads, dim, dtype, parameters)
            assert_close_to_textbook(inputs, impl="triton")
            assert_close_to_textbook(inputs)  # the direct launch


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    batch, tokens, heads, dim = 5, 1 << 18, 24, 128
    query = torch.randn(1, tokens, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    assert batch * query.numel() > 1 << 31
    _, _, *parameters = inputs_of(1, 1, 1, dim, torch.bfloat16)
    tables = [table.expand(tokens, -1).contiguous() for table in parameters[2:]]
    many = query.expand(batch, -1, -1, -1)
    ours = rotary_rms_norm(many, many, *parameters[:2], *tables, impl="triton")
    expected = rotary_rms_norm(
        query[:, -64:], query[:, -64:], *parameters[:2], *(t[-64:] for t in tables),
        impl="reference",
    )  # fmt: skip
    for out, true in zip(ours, expected, strict=True):
        torch.testing.assert_close(out[-1:, -64:], true)


X, WEIGHT, TABLE = torch.zeros(2, 3, 4, 16), torch.zeros(16), torch.zeros(3, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": X.int()}, TypeError, "`query` must be float16, .* got torch.int32"),
        ({"query": X[0]}, ValueError, r"`query` must have shape \(B, N, H, D\), got \(3, 4, 16\)"),
        ({"query": None}, TypeError, "`query` must be a tensor, got NoneType"),
        ({"query": X[..., :15]}, ValueError, "`query` must have an even number .* got 15"),
        ({"key": X[:, :2]}, ValueError, r"`key` must .* got \(2, 2, 4, 16\)"),
        ({"key": X.half()}, TypeError, "`key` must have dtype torch.float32, got torch.float16"),
        ({"query_weight": WEIGHT[:3]}, ValueError, r"`query_weight` must .* got \(3,\)"),
        ({"key_weight": WEIGHT.int()}, TypeError, "`key_weight` must be float16"),
        ({"cosines": TABLE[:2]}, ValueError, r"`cosines` must .* \(3, 16\), got \(2, 16\)"),
        ({"sines": TABLE[:, ::2]}, ValueError, r"`sines` must .* \(3, 16\), got \(3, 8\)"),
        ({"sines": TABLE.to("meta")}, ValueError, "`sines` must be on cpu, got meta"),
        ({"impl": "cuda"}, ValueError, "`impl` must be one of auto, .* got 'cuda'"),
    ],
)
def test_errors(changes, error, message):
    names = ("query", "key", "query_weight", "key_weight", "cosines", "sines")
    values = (X, X, WEIGHT, WEIGHT, TABLE, TABLE)
    with pytest.raises(error, match=message):
        rotary_rms_norm(**(dict(zip(names, values, strict=True)) | changes))


@on_gpu_or_interpreted
def test_other_heads_take_the_reference():
    inputs = inputs_of(1, 2, 3, 24)
    with pytest.raises(NotImplementedError, match="takes heads of 16, .* got 24"):
        rotary_rms_norm(*inputs, impl="triton")
    assert_close_to_textbook(inputs)
