"""Adaptive norms and gated sums: the textbook form, the Triton kernel against it, the contract."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernel_checks import DEVICE, on_gpu_or_interpreted, poisoned
from lintra.kernels import ada_layer_norm, gated_ada_layer_norm, gated_add
from lintra.kernels._common.kernel_call import KernelCall
from lintra.kernels._common.pinning import pinned
from lintra.kernels._common.plans import Plans
from lintra.kernels.ada_layer_norm.configs import BwdLaunch, Launch, SumLaunch, launch_of

__all__ = ["poisoned"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both = pytest.mark.parametrize("function", [ada_layer_norm, gated_ada_layer_norm])
every = pytest.mark.parametrize("function", [ada_layer_norm, gated_ada_layer_norm, gated_add])
# (B, N, C): one token and one channel, a power of two or not, a program that is not full.
SHAPES = [(1, 1, 1), (3, 1, 2), (2, 3, 5), (2, 19, 48), (1, 9, 24), (2, 5, 300), (1, 3, 1152)]


def inputs_of(function, batch, tokens, channels, dtype=torch.float32, parameters=None):
    """Tokens, and parameters as they lie in the output of one linear map: chunks, not copies."""
    x, update = (3 * torch.randn(2, batch, tokens, channels) + 2).to(DEVICE, dtype)
    whole = torch.randn(batch, 6 * channels).to(DEVICE, parameters or dtype)
    gate, scale, shift = whole.chunk(6, dim=-1)[1:4]
    gated, norm = (update, gate), (scale, shift)
    return (
        x,
        *(() if function is ada_layer_norm else gated),
        *(() if function is gated_add else norm),
    )


def textbook(x, scale, shift, eps=1e-6):
    x, scale, shift = x.double(), scale.double()[:, None], shift.double()[:, None]
    deviation = x - x.mean(-1, keepdim=True)
    normed = deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * (1 + scale) + shift


def assert_rounded_once(out, exact, like):
    assert out.dtype == like.dtype
    assert out.shape == exact.shape
    # Half a unit in the last place; what is not rounded at the end has the errors of its sums.
    units = 8 if like.dtype.itemsize >= 4 else 0.55
    error = (out.double() - exact).abs().max()
    assert error <= units * torch.finfo(like.dtype).eps * exact.abs().max()


def assert_close_to_textbook(function, inputs, **options):
    x, *others = inputs
    if function is gated_add:
        options.pop("eps", None)
    out = function(*inputs, **options)
    if function is not ada_layer_norm:
        update, gate, *others = others
        h, out = out if others else (out, None)
        assert_rounded_once(h, x.double() + gate.double()[:, None] * update.double(), x)
        x = h
    if others:
        assert_rounded_once(out, textbook(x, *others, options.get("eps", 1e-6)), x)


@every
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=str)
def test_textbook(function, dtype, parameters):
    inputs = inputs_of(function, 2, 3, 5, dtype, parameters)
    assert_close_to_textbook(function, inputs, impl="reference", eps=0.25)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_close_to_textbook(function, inputs, impl="reference")


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(function, shape):
    assert_close_to_textbook(function, inputs_of(function, *shape), impl="triton", eps=1e-3)


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@both
@pytest.mark.parametrize("launch", [Launch(1, 4), Launch(2, 2), Launch(4, 8)], ids=str)
def test_every_launch_gives_the_same(function, launch):
    with pinned(ada_layer_norm=launch):
        assert_close_to_textbook(function, inputs_of(function, 2, 5, 40), impl="triton")


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("launch", [SumLaunch(8, 1), SumLaunch(64, 2), SumLaunch(512, 4)], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 40), (3, 7, 9), (1, 33, 1)], ids=str)
def test_every_launch_of_a_sum_gives_the_same(launch, shape):
    with pinned(gated_add=launch):
        assert_close_to_textbook(gated_add, inputs_of(gated_add, *shape), impl="triton")


@on_gpu_or_interpreted
def test_a_sum_of_any_strides_and_no_tokens():
    x, update, gate = inputs_of(gated_add, 2, 8, 6)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1), update.mT.contiguous().mT
    wide = torch.randn(2, 12, device=DEVICE)
    for other in (gate, wide[:, ::2], wide[:, 1:7], gate[:1].expand(2, 6)):
        assert_close_to_textbook(gated_add, (*turned, other), impl="triton")
    for start in (x[:, :0], x[:0], x[..., :0]):
        few = gate[: len(start), : start.shape[-1]]
        assert gated_add(start, start, few, impl="triton").shape == start.shape


@on_gpu_or_interpreted
@both
def test_any_strides_and_no_tokens(function):
    x, *gated, scale, shift = inputs_of(function, 2, 8, 6)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1)]
    wide = torch.randn(2, 12, device=DEVICE)
    parameters = [wide[:, ::2], shift[:1].expand(2, 6)]  # neither has channels side by side
    if gated:
        update = gated[0].mT.contiguous().mT  # as a convolution leaves them
        turned += [update, scale.mT.contiguous().mT]
    assert_close_to_textbook(function, (*turned, *parameters), impl="triton")
    for start in (x[:, :0], x[:0]):
        few = [p[: len(start)] for p in (scale, shift)]
        rest = [start, few[0]] if gated else []
        out = function(start, *rest, *few, impl="triton")
        assert all(part.shape == start.shape for part in (out if gated else [out]))


@on_gpu_or_interpreted
@every
def test_operator_passes_opcheck(function):
    operator = getattr(torch.ops.lintra, f"{function.__name__}_fwd").default
    eps = () if function is gated_add else (1e-6,)
    torch.library.opcheck(operator, (*inputs_of(function, 2, 3, 5), *eps))


@on_gpu_or_interpreted
@every
@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_meta(function, impl):
    inputs = inputs_of(function, 2, 3, 5, torch.bfloat16)
    expected = function(*inputs)
    out = function(*(x.to("meta") for x in inputs), impl=impl)
    pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]
    for empty, x in pairs:
        assert (empty.shape, empty.dtype, empty.is_meta) == (x.shape, x.dtype, True)


def gradients_of(function, inputs, weights, dtype=None, **options):
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    outs = out if isinstance(out, tuple) else (out,)
    return torch.autograd.grad(
        outs, leaves, [w.to(x.dtype) for w, x in zip(weights, outs, strict=True)]
    )


def assert_gradients_close(function, inputs, impl="triton"):
    """err(kernel, float64) <= 2 err(reference, float64) + what its sums over tokens round."""
    outs = 2 if function is gated_ada_layer_norm else 1
    weights = [torch.randn(inputs[0].shape).to(DEVICE) for _ in range(outs)]
    # The reference normalises the sum that has been rounded, which float64 does not round.
    ours = gradients_of(function, inputs, weights, impl=impl)
    plain = gradients_of(function, inputs, weights, impl="reference")
    exact = gradients_of(function, inputs, weights, torch.float64, impl="reference")
    for x, got, same, true in zip(inputs, ours, plain, exact, strict=True):
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        allowed = 2 * (same.double() - true).abs().max()
        allowed = allowed + 4 * torch.finfo(x.dtype).eps * true.abs().max()
        assert (got.double() - true).abs().max() <= allowed


@every
def test_gradients_of_the_reference(function):
    inputs = [x.double().detach().requires_grad_() for x in inputs_of(function, 2, 3, 5)]
    assert torch.autograd.gradcheck(function, inputs)


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(function, shape):
    assert_gradients_close(function, inputs_of(function, *shape))


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@every
@pytest.mark.parametrize("launch", [BwdLaunch(1, 4, 1), BwdLaunch(4, 2, 3, 3)], ids=str)
def test_every_launch_gives_the_same_gradients(function, launch, monkeypatch):
    from lintra.kernels.ada_layer_norm import triton_bwd

    monkeypatch.setattr(triton_bwd, "multiprocessors", lambda _: 3)  # several splits, uneven ones
    with pinned(ada_layer_norm_bwd=launch):
        for shape in ((2, 5, 40), (1, 23, 9), (4, 1, 16)):
            assert_gradients_close(function, inputs_of(function, *shape))
        # In an order that is always the same.
        inputs = inputs_of(function, 2, 19, 24)
        weights = [torch.randn_like(inputs[0])] * (2 if function is gated_ada_layer_norm else 1)
        first, second = (gradients_of(function, inputs, weights, impl="triton") for _ in range(2))
        assert all(map(torch.equal, first, second))


@on_gpu_or_interpreted
@every
def test_gradients_of_any_strides_and_no_tokens(function):
    inputs = [x.mT.contiguous().mT for x in inputs_of(function, 2, 8, 6)]
    assert_gradients_close(function, inputs)
    x, *others = inputs_of(function, 2, 8, 6)
    few = [x[:, :0], *(y[:, :0] if y.ndim == 3 else y for y in others)]
    weights = [few[0]] * (2 if function is gated_ada_layer_norm else 1)
    grads = gradients_of(function, few, weights, impl="triton")
    assert [x.shape for x in grads] == [x.shape for x in few]
    assert all(x.eq(0).all() for x in grads)


@on_gpu_or_interpreted
@both
def test_gradients_without_an_epsilon(function):
    """Programs that are not full have tokens of zeros."""
    inputs = inputs_of(function, 2, 9, 48)
    weights = [torch.randn_like(inputs[0])] * (2 if function is gated_ada_layer_norm else 1)
    ours, plain = (
        gradients_of(function, inputs, weights, impl=impl, eps=0.0)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@on_gpu_or_interpreted
@every
def test_gradients_of_some_inputs_and_dtypes(function):
    """Parameters of another dtype, one of them frozen; h of a gated norm without a use."""
    x, *others = inputs_of(function, 2, 3, 5, parameters=torch.float16)
    others[-1].requires_grad_(False)
    x.requires_grad_()
    results = []
    for impl in ("triton", "reference"):
        out = function(x, *others, impl=impl)
        out = out[1] if isinstance(out, tuple) else out
        results.append(torch.autograd.grad(out.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    weight = others[-1].detach().requires_grad_()
    (out, *_), (want, *_) = (
        torch.autograd.grad(
            (lambda o: o[1] if isinstance(o, tuple) else o)(
                function(x.detach(), *others[:-1], weight, impl=impl)
            ).sum(),
            weight,
        )
        for impl in ("triton", "reference")
    )
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)


@on_gpu_or_interpreted
@every
def test_a_second_derivative_is_refused(function):
    inputs = [x.detach().requires_grad_() for x in inputs_of(function, 2, 3, 5)]
    out = function(*inputs, impl="triton")
    out = out[1] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[1], create_graph=True)
    with pytest.raises(NotImplementedError, match=f"`{function.__name__}` must be differentiated"):
        grad.sum().backward()


@on_gpu_or_interpreted
@pytest.mark.parametrize("name", ["ada_layer_norm", "gated_ada_layer_norm", "gated_add"])
def test_operator_of_gradients_passes_opcheck(name):
    x, update, gate, scale, _ = inputs_of(gated_ada_layer_norm, 2, 3, 5)
    arguments = {
        "ada_layer_norm": (update, x, scale, 1e-6),
        "gated_ada_layer_norm": (update, x, x, update, gate, scale, 1e-6),
        "gated_add": (x, update, gate),
    }[name]
    torch.library.opcheck(getattr(torch.ops.lintra, f"{name}_bwd").default, arguments)


@on_gpu_or_interpreted
def test_gradients_of_many_channels_take_the_reference():
    inputs = [x.requires_grad_() for x in inputs_of(gated_add, 1, 2, 8193)]
    with pytest.raises(NotImplementedError, match="gradients takes up to 8192 channels"):
        gated_add(*inputs, impl="triton")
    assert_gradients_close(gated_add, inputs, impl="auto")


@pytest.mark.gpu
@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=str)
def test_gradients_on_gpu(function, dtype, parameters):
    for channels in (17, 192, 384, 768, 1152, 3072, 4096, 8192):
        inputs = inputs_of(function, 3, 197, channels, dtype, parameters)
        for _ in range(2):  # through Triton, and launched directly
            assert_gradients_close(function, inputs, impl="auto")


@every
def test_compiles_without_a_graph_break(function):
    inputs = inputs_of(function, 2, 3, 5)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


@every
@pytest.mark.parametrize("training", [False, True])
def test_a_tracer_is_given_sums_and_gradients_to_fuse(function, training, monkeypatch):
    from lintra.kernels.ada_layer_norm import api, configs

    def kernel(*_):
        raise AssertionError("launched")

    monkeypatch.setattr(api, f"{function.__name__}_triton", kernel)
    monkeypatch.setattr(api, "takes_kernel", lambda *_: True)  # as on a GPU
    monkeypatch.setattr(configs, "GATED_ADD_MIN_ELEMENTS", 30)
    inputs = [x.requires_grad_(training) for x in inputs_of(function, 2, 3, 5)]
    with pytest.raises(AssertionError, match="launched"):
        function(*inputs)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    if function is gated_add or training:
        compiled(*inputs)
    else:
        with pytest.raises(Exception, match="launched"):
            compiled(*inputs)


@pytest.mark.parametrize("function", [ada_layer_norm, gated_ada_layer_norm])
def test_the_operator_in_a_graph_serves_all_sizes(function, monkeypatch):
    from lintra.kernels.ada_layer_norm import api

    monkeypatch.setattr(api, "takes_kernel", lambda *_: True)  # as on a GPU
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for tokens in (3, 7, 12):
        inputs = inputs_of(function, 2, tokens, 5)
        inputs = [x.clone() for x in inputs]  # else sizes that meet by chance stay guarded
        expected = function(*inputs, impl="reference")
        torch.testing.assert_close(compiled(*inputs), expected)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
    operators = [node for node in counter.graphs[-1].graph.nodes if "lintra" in str(node.target)]
    assert len(operators) == 1


@both
def test_the_operator_in_a_graph_runs_on_old_devices(function, monkeypatch):
    from lintra.kernels.ada_layer_norm import triton_fwd

    monkeypatch.setattr(triton_fwd, "is_too_old", lambda _: True)
    monkeypatch.setattr(triton_fwd, "_PLANS", Plans(triton_fwd._plan))
    monkeypatch.setattr(KernelCall, "__call__", lambda *_: pytest.fail("launched"))
    inputs = inputs_of(function, 2, 3, 5)
    operator = getattr(torch.ops.lintra, f"{function.__name__}_fwd").default
    expected = function(*inputs, impl="reference")
    torch.testing.assert_close(operator(*inputs, 1e-6), expected, rtol=0, atol=0)


def test_small_sums_are_left_to_pytorch(monkeypatch):
    from lintra.kernels.ada_layer_norm import api, configs

    def kernel(*_):
        raise AssertionError("launched")

    monkeypatch.setattr(api, "gated_add_triton", kernel)
    monkeypatch.setattr(api, "takes_kernel", lambda *_: True)  # as on a GPU
    inputs = inputs_of(gated_add, 2, 3, 5)
    monkeypatch.setattr(configs, "GATED_ADD_MIN_ELEMENTS", 31)
    assert_close_to_textbook(gated_add, inputs)
    with pytest.raises(AssertionError, match="launched"):
        gated_add(*inputs, impl="triton")
    monkeypatch.setattr(configs, "GATED_ADD_MIN_ELEMENTS", 30)
    with pytest.raises(AssertionError, match="launched"):
        gated_add(*inputs)


def test_launches():
    expected = {1: (64, 4), 128: (32, 4), 768: (4, 4), 1152: (2, 4), 3072: (1, 4), 8192: (1, 8)}
    assert {c: (launch_of(c).rows, launch_of(c).warps) for c in expected} == expected


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=str)
def test_kernel_on_gpu(function, dtype, parameters):
    for channels in (17, 192, 384, 768, 1152, 3072, 4096, 8192):
        inputs = inputs_of(function, 3, 197, channels, dtype, parameters)
        assert_close_to_textbook(function, inputs, impl="triton")
        if channels % 8 == 0:  # both the way through Triton and the direct launch
            assert_close_to_textbook(function, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_sum_on_gpu(dtype):
    x, update, gate = inputs = inputs_of(gated_add, 1, 16384, 1152, dtype)
    assert_close_to_textbook(gated_add, inputs)
    expected = torch.addcmul(x, gate[:, None], update)
    for impl in ("auto", "triton"):  # now the direct launch
        torch.testing.assert_close(gated_add(*inputs, impl=impl), expected)


@pytest.mark.gpu
@every
def test_more_elements_than_32_bits_count(function):
    batch, tokens, channels = 3, 1 << 20, 768
    x = torch.empty(batch, tokens, channels, device=DEVICE, dtype=torch.bfloat16)
    assert x.numel() > 1 << 31
    x[:] = torch.randn(64, channels).to(x).repeat(tokens // 64, 1)
    scale, shift = torch.randn(2, batch, channels).to(x)
    arguments = {
        ada_layer_norm: (x, scale, shift),
        gated_ada_layer_norm: (x, x, scale, scale, shift),
        gated_add: (x, x, scale),
    }[function]
    out = function(*arguments, impl="triton")
    for sample in range(batch):
        part = slice(sample, sample + 1)
        heads = [a[part, :64] if a is x else a[part] for a in arguments]
        expected = function(*heads, impl="reference")
        pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours[part, -64:], theirs)


X, PARAMETER = torch.zeros(2, 3, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "`x` must be float16, .* got torch.int32"),
        ({"x": X[0]}, ValueError, r"`x` must have shape \(B, N, C\), got \(3, 4\)"),
        ({"x": None}, TypeError, "`x` must be a tensor, got NoneType"),
        ({"update": X[:, :2]}, ValueError, r"`update` must .* \(2, 3, 4\), got \(2, 2, 4\)"),
        ({"update": X.int()}, TypeError, "`update` must be float16, .* got torch.int32"),
        ({"gate": PARAMETER[:1]}, ValueError, r"`gate` must .* \(2, 4\), got \(1, 4\)"),
        ({"scale": X}, ValueError, r"`scale` must have shape \(B, C\), got \(2, 3, 4\)"),
        ({"scale": PARAMETER.int()}, TypeError, "`scale` must be float16, .* got torch.int32"),
        ({"shift": PARAMETER[:, :3]}, ValueError, r"`shift` must .* \(2, 4\), got \(2, 3\)"),
        ({"shift": PARAMETER.to("meta")}, ValueError, "`shift` must be on cpu, got meta"),
        ({"impl": "cuda"}, ValueError, "`impl` must be one of auto, .* got 'cuda'"),
        ({"impl": "triton", "x": X.double()}, NotImplementedError, "`impl` must not be 'triton'"),
    ],
)
def test_errors(changes, error, message):
    names = ("x", "update", "gate", "scale", "shift")
    arguments = dict(zip(names, (X, X, *[PARAMETER] * 3), strict=True)) | changes
    with pytest.raises(error, match=message):
        gated_ada_layer_norm(**arguments)
    for function, others in (
        (ada_layer_norm, {"update", "gate"}),
        (gated_add, {"scale", "shift"}),
    ):
        if not others & set(changes):
            rest = {name: x for name, x in arguments.items() if name not in others}
            with pytest.raises(error, match=message):
                function(**rest)


@on_gpu_or_interpreted
@both
def test_too_many_channels_take_the_reference(function):
    inputs = inputs_of(function, 1, 2, 8193)
    with pytest.raises(NotImplementedError, match="takes 1 to 8192 channels, got 8193"):
        function(*inputs, impl="triton")
    assert_close_to_textbook(function, inputs)
