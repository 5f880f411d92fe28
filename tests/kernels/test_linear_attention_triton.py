"""The Triton kernels of linear attention against the reference, and as PyTorch operators."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from kernel_checks import DEVICE, assert_three_way, on_gpu_or_interpreted, poisoned, results
from lintra.kernels import linear_attention
from lintra.kernels._common.launch import architecture
from lintra.kernels._common.pinning import pinned
from lintra.kernels.linear_attention import ways
from lintra.kernels.linear_attention.reference import FEATURE_MAPS, NORMALIZERS

pytestmark = on_gpu_or_interpreted
__all__ = ["poisoned"]

# A covariance, and gradients but those of Hopper's kernels, take the linear order also where
# quadratic is pinned.
WAYS = ["fused", "split", "wide", "quadratic"]


def inputs_of(shape, dtype=torch.float32, num_keys=None, value_dim=None, mean=0.0):
    """Views of a fused projection where the shapes allow it, and a gradient of the output."""
    batch, length, heads, dim = shape
    if num_keys is None and value_dim is None:
        qkv = (torch.randn(batch, length, 3, heads, dim) + mean).to(DEVICE, dtype)
        tensors = list(qkv.unbind(2))
    else:
        sizes = [(length, dim), (num_keys or length, dim), (num_keys or length, value_dim or dim)]
        tensors = [(torch.randn(batch, n, heads, d) + mean).to(DEVICE, dtype) for n, d in sizes]
    d_out = torch.randn(batch, length, heads, tensors[2].shape[3]).to(DEVICE, dtype)
    return tensors, d_out


def textbook(feature_map="relu", normalizer="ratio", scale=None, eps=1e-6):
    """The formula with every product and sum in the dtype of its inputs."""

    def function(*tensors):
        q, k, v = (x.transpose(1, 2) for x in tensors)
        factor = scale or (q.shape[3] ** -0.5 if normalizer == "covariance" else 1.0)
        phi = FEATURE_MAPS[feature_map]
        return NORMALIZERS[normalizer](phi(q), phi(k), v, factor, eps, True).transpose(1, 2)

    return function


def compare(tensors, d_out, way, splits=2, num_terms=0, **options):
    with pinned(splits=splits, fwd_way=way, bwd_way=way):
        assert_three_way(
            lambda *x: linear_attention(*x, impl="triton", **options),
            lambda *x: linear_attention(*x, impl="reference", **options),
            tensors,
            d_out,
            textbook=textbook(**options) if DEVICE == "cuda" else None,
            num_terms=num_terms,
        )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_every_member_every_way(way, feature_map, normalizer):
    (q, k, v), d_out = inputs_of((1, 21, 2, 24), num_keys=37, value_dim=40, mean=0.5)
    if normalizer == "ratio" and feature_map == "identity":
        q, k = q.abs(), k.abs()  # features of a ratio are not negative
    options = {"feature_map": feature_map, "normalizer": normalizer, "scale": 0.3, "eps": 1e-2}
    compare([q, k, v], d_out, way, **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("way", ["fused", "split"])
@pytest.mark.parametrize("feature_map", ["relu", "elu1"])
def test_keys_first(way, feature_map):
    tensors, d_out = inputs_of((1, 21, 2, 24), num_keys=37, value_dim=40, mean=0.5)
    with pinned(keys_first=True):
        compare(tensors, d_out, way, feature_map=feature_map, scale=0.3, eps=1e-2)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 17, 3, 32), (1, 49, 1, 72)], ids=str)
@pytest.mark.parametrize("normalizer", ["ratio", "covariance"])
def test_views_of_a_fused_projection(shape, normalizer):
    tensors, d_out = inputs_of(shape)
    for way in ("fused", "split"):
        compare(tensors, d_out, way, normalizer=normalizer)


@pytest.mark.parametrize("dims", [(192, 96), (288, 17)], ids=str)
def test_wide_heads(dims):
    tensors, d_out = inputs_of((1, 5, 1, dims[0]), num_keys=20, value_dim=dims[1])
    compare(tensors, d_out, "wide")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("length", "num_keys"), [(21, 1), (1, 17), (49, 49), (21, 197), (256, 17)])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("normalizer", ["ratio", "none"])
def test_quadratic_order(length, num_keys, feature_map, normalizer):
    (q, k, v), d_out = inputs_of((1, length, 1, 24), num_keys=num_keys, value_dim=40, mean=0.5)
    if normalizer == "ratio" and feature_map == "identity":
        q, k = q.abs(), k.abs()
    options = {"feature_map": feature_map, "normalizer": normalizer, "scale": 0.3, "eps": 1e-2}
    # The gradient of the query of a single key is what cancels, in the linear order too.
    num_terms = 1 if num_keys == 1 else 0
    compare([q, k, v], d_out, "quadratic", num_terms=num_terms, **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(1, 17, 2, 192), (1, 49, 1, 288), (1, 197, 1, 72)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_quadratic_order_of_a_fused_projection(shape, dtype):
    tensors, d_out = inputs_of(shape, dtype)
    tensors[0][:, :3] = -tensors[0][:, :3].abs()  # queries without features
    compare(tensors, d_out, "quadratic")


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "forward", "backward"),
    [
        (256, 256, 72, "quadratic", "quadratic"),
        (256, 257, 72, "split", "split"),
        (512, 512, 192, "quadratic", "quadratic"),
        (513, 512, 192, "wide", "wide"),
        (512, 64, 288, "quadratic", "quadratic"),
        (1024, 64, 288, "wide", "wide"),
        (197, 197, 64, "fused", "fused"),
        (256, 256, 257, "quadratic", "wide"),  # not for the copy engine
    ],
)
def test_order_on_hopper(monkeypatch, queries, keys, dim, forward, backward):
    monkeypatch.setattr(ways, "architecture", lambda index: 90)
    monkeypatch.setattr(ways, "knows_gluon", lambda: True)
    query, key = (torch.empty(64, n, 4, dim, dtype=torch.bfloat16) for n in (queries, keys))
    for name, way in (("fwd", forward), ("bwd", backward)):
        assert ways.way_of(name, query, key, key, "ratio") == way
        assert ways.way_of(name, query, key, key, "covariance") != "quadratic"
        assert ways.way_of(name, *(x.half() for x in (query, key, key)), "ratio") != "quadratic"
        with pinned(quadratic_kernel="general", bwd_way="quadratic"):
            assert ways.way_of("bwd", query, key, key, "ratio") != "quadratic"


@pytest.mark.parametrize("way", WAYS)
def test_large_means_keep_their_digits(way):
    (q, k, v), _ = inputs_of((1, 70, 1, 16))
    k, v = k + 100, v + 100
    options = {"feature_map": "identity", "normalizer": "covariance"}
    exact = linear_attention(q.double(), k.double(), v.double(), **options)
    with pinned(fwd_way=way, splits=2):
        out = linear_attention(q, k, v, impl="triton", **options)
    assert (out - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("normalizer", ["ratio", "covariance"])
def test_float32_sums_of_many_tokens_keep_their_digits(normalizer):
    # A mean of values from plain sums in order errs by twice as much.
    (q, k, v), _ = inputs_of((1, 4097, 1, 16))
    exact = linear_attention(q.double(), k.double(), v.double(), normalizer=normalizer)
    for way in ("fused", "split"):
        with pinned(fwd_way=way, splits=2):
            out = linear_attention(q, k, v, normalizer=normalizer, impl="triton")
        assert (out - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_float16_sums_beyond_its_range():
    # sum_j relu(k_j) v_j passes 65504 (spec numerics 2), and some queries are all zero.
    (q, k, v), d_out = inputs_of((1, 40, 1, 16), torch.float16)
    q[:, :3] = -q[:, :3].abs()
    tensors = [q, k.abs() * 500, v + 200]
    for way in WAYS:
        compare(tensors, d_out, way)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)], ids=str)
def test_zero_sizes(shape):
    tensors, d_out = inputs_of(shape)
    compare(tensors, d_out, "fused")


def test_no_keys():
    tensors, d_out = inputs_of((1, 3, 2, 8), num_keys=0, value_dim=8)
    tensors[1], tensors[2] = tensors[1][:, :0], tensors[2][:, :0]
    compare(tensors, d_out, "split")


def test_any_strides():
    tensors, d_out = inputs_of((2, 9, 2, 16))
    strange = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in tensors]
    compare(strange, d_out[:1].expand(2, -1, -1, -1), "fused")


@pytest.mark.parametrize("way", ["split", "quadratic"])
def test_same_bits_twice(way):
    tensors, d_out = inputs_of((1, 70, 2, 16))
    with pinned(splits=2, fwd_way=way, bwd_way=way):
        first, second = (
            results(lambda *x: linear_attention(*x, impl="triton"), tensors, d_out)
            for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators_pass_opcheck():
    (q, k, v), d_out = inputs_of((1, 9, 2, 16))
    options = ("relu", "ratio", 1.0, 1e-6)
    torch.library.opcheck(torch.ops.lintra.linear_attention_fwd.default, (q, k, v, *options))
    torch.library.opcheck(torch.ops.lintra.linear_attention_bwd.default, (d_out, q, k, v, *options))


def test_meta_tensors_have_shapes_only():
    query, value = torch.empty(2, 5, 3, 8, device="meta"), torch.empty(2, 5, 3, 4, device="meta")
    out = linear_attention(query, query, value, impl="triton")
    assert out.shape == (2, 5, 3, 4)
    assert out.is_meta


def test_compiles_once_for_all_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda *x: linear_attention(*x, impl="triton"),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    counts = []
    for length in (9, 20, 33):
        tensors, d_out = inputs_of((2, length, 1, 16))
        compiled = results(function, tensors, d_out)
        eager = results(lambda *x: linear_attention(*x, impl="triton"), tensors, d_out)
        for a, b in zip(compiled, eager, strict=True):
            torch.testing.assert_close(a, b)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


class _Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x):
        return linear_attention(*self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2), impl="triton")


def test_exports_with_a_free_length():
    module, tokens = _Attention().to(DEVICE), torch.randn(2, 9, 16, device=DEVICE)
    lengths = {"x": {1: torch.export.Dim("tokens", min=2, max=99)}}
    program = torch.export.export(module, (tokens,), dynamic_shapes=lengths)
    longer = torch.randn(2, 21, 16, device=DEVICE)
    torch.testing.assert_close(program.module()(longer), module(longer))


def test_autocast_reaches_the_kernel_as_its_inputs_are():
    module, tokens = _Attention().to(DEVICE), torch.randn(2, 9, 16, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = module(tokens)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), module(tokens), rtol=1e-2, atol=1e-2)


def test_checkpointing():
    tensors, d_out = inputs_of((1, 9, 2, 16))
    plain, kept = (
        results(function, tensors, d_out)
        for function in (
            lambda *x: linear_attention(*x, impl="triton"),
            lambda *x: checkpoint(
                lambda *y: linear_attention(*y, impl="triton"), *x, use_reentrant=False
            ),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_what_cannot_be_differentiated_says_so():
    (q, k, v), _ = inputs_of((1, 5, 1, 8))
    with pytest.raises(NotImplementedError, match="neither torch.func nor forward-mode"):
        torch.func.grad(lambda x: linear_attention(x, k, v, impl="triton").sum())(q)
    q = q.detach().requires_grad_()
    out = linear_attention(q, k, v, impl="triton")
    for loss in (out.square().sum(), out.sum()):  # the second has a gradient without a graph
        (grad,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(NotImplementedError, match="`linear_attention` must be differentiated"):
            grad.sum().backward()


def test_a_kernel_on_the_cpu_must_be_asked_for():
    code = """
import torch
from lintra.kernels import linear_attention
x = torch.ones(1, 2, 1, 8)
linear_attention(x, x, x)
try:
    linear_attention(x, x, x, impl="triton")
except NotImplementedError as error:
    print(error)
"""
    environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "need a CUDA device, got cpu (TRITON_INTERPRET=1 runs them on cpu)" in run.stdout


def test_a_small_model_learns_alike_with_both():
    def losses(impl):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(8, 24), torch.nn.Linear(8, 4)]
        layers = [layer.to(DEVICE) for layer in layers]
        optimizer = torch.optim.AdamW([p for x in layers for p in x.parameters()], lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        history = []
        for _ in range(12):
            x = torch.randn(2, 12, 8, generator=generator).to(DEVICE)
            target = x.cumsum(1)[..., :4].tanh()
            q, k, v = layers[0](x).unflatten(-1, (3, 1, 8)).unbind(2)
            out = layers[1](linear_attention(q, k, v, impl=impl).flatten(2))
            loss = (out - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    kernel, reference = losses("triton"), losses("reference")
    assert kernel[-1] < kernel[0]
    assert kernel == pytest.approx(reference, rel=1e-4)


LENGTHS = [1, 17, 49, 63, 196, 197, 4097]
WIDTHS = [16, 17, 32, 64, 72, 96, 128, 192, 256, 288]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", LENGTHS)
def test_shapes_on_gpu(length, width, dtype):
    tensors, d_out = inputs_of((2, length, 2, width), dtype)
    for normalizer in ("ratio", "covariance"):
        for way in WAYS if width <= 128 else WAYS[2:]:
            compare(tensors, d_out, way, num_terms=length, normalizer=normalizer)


@pytest.mark.gpu
@pytest.mark.parametrize("normalizer", ["ratio", "covariance"])
def test_one_program_for_192_channels(normalizer):
    (q, k, v), _ = inputs_of((64, 256, 2, 192), torch.bfloat16)
    exact = linear_attention(q.double(), k.double(), v.double(), normalizer=normalizer)
    with pinned(fwd_way="fused"):
        out, again = (
            linear_attention(q, k, v, normalizer=normalizer, impl="triton") for _ in range(2)
        )
    assert torch.equal(out, again)
    error = (out.double() - exact).abs().max()
    assert error <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    base = torch.zeros(3, 2**20, 3, 4, 64, dtype=torch.bfloat16, device="cuda")  # 2.4e9 elements
    small = torch.randn(64, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    base[-1, -64:] = small
    d_small = torch.randn(1, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
    d_out = torch.zeros(3, 2**20, 4, 64, dtype=torch.bfloat16, device="cuda")
    d_out[-1:, -64:] = d_small
    tensors = base.unbind(2)
    got = results(lambda *x: linear_attention(*x, impl="triton"), tensors, d_out)
    # Zero keys add nothing to either sum of relu and ratio.
    exact = [x[None].double() for x in small.unbind(1)]
    for place, (mine, true) in enumerate(
        zip(got, results(linear_attention, exact, d_small.double()), strict=True)
    ):
        error = (mine[-1:, -64:].double() - true).abs().max()
        assert error <= 3 * torch.finfo(torch.bfloat16).eps * true.abs().max(), place


@pytest.mark.gpu
def test_cuda_graph_replays():
    tensors, d_out = inputs_of((2, 50, 2, 64), torch.bfloat16)

    def step():
        return results(lambda *x: linear_attention(*x, impl="triton"), tensors, d_out)

    # Autograd must first run on the stream of the capture, as PyTorch's notes on graphs say.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    tensors[0].copy_(torch.randn_like(tensors[0]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 256, 256, 192), (1, 49, 197, 288), (2, 197, 65, 72), (1, 1, 17, 64), (1, 300, 129, 16),
        (2, 65, 512, 320),
    ],
    ids=str,
)  # fmt: skip
def test_quadratic_gradients_on_gpu(shape, feature_map):
    from lintra.kernels.linear_attention.triton_bwd import linear_attention_bwd  # needs triton

    if architecture(0) != 90:
        pytest.skip("needs a GPU of compute capability 9.0")
    batch, length, num_keys, dim = shape
    (q, k, v), d_out = inputs_of((batch, length, 2, dim), torch.bfloat16, num_keys, dim)
    normalizer = "none" if feature_map == "identity" else "ratio"
    options = {"feature_map": feature_map, "normalizer": normalizer, "scale": 0.3, "eps": 1e-6}
    exact = results(
        lambda *x: linear_attention(*x, **options), [x.double() for x in (q, k, v)], d_out.double()
    )
    # Not through autograd, which runs CUDA's backward in a thread that knows no pins.
    with pinned(bwd_way="quadratic"):
        first, second = (linear_attention_bwd(d_out, q, k, v, *options.values()) for _ in range(2))
    for place, (got, again, true) in enumerate(zip(first, second, exact[1:], strict=True)):
        assert torch.equal(got, again)
        error = (got.double() - true).abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps * true.abs().max(), place


@pytest.mark.gpu
def test_quadratic_gradients_of_what_the_copy_engine_refuses():
    # The gradient of a sum is one number; a remembered plan meets an address off by two bytes.
    if architecture(0) != 90:
        pytest.skip("needs a GPU of compute capability 9.0")
    tensors, _ = inputs_of((2, 49, 2, 192), torch.bfloat16)
    d_out = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, device="cuda").expand(2, 49, 2, 192)
    want = results(linear_attention, [x.contiguous() for x in tensors], d_out.contiguous())

    def shifted(x):
        return torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)

    for grad in (d_out, shifted(d_out)):
        for got, true in zip(results(linear_attention, tensors, grad)[1:], want[1:], strict=True):
            assert torch.equal(got, true)
    found = results(linear_attention, [shifted(x) for x in tensors], d_out)  # by another order
    exact = results(linear_attention, [x.double() for x in tensors], d_out.double())
    for got, true in zip(found[1:], exact[1:], strict=True):
        error = (got.double() - true).abs().max()
        assert error <= 4 * torch.finfo(got.dtype).eps * true.abs().max()
