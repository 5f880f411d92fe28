"""Linear attention of wide heads: the state that training keeps, and the kernels for Hopper."""

import importlib

import pytest
import torch

from kernel_checks import DEVICE, on_gpu_or_interpreted, poisoned, results
from lintra.kernels import linear_attention
from lintra.kernels._common.launch import architecture
from lintra.kernels._common.pinning import pinned

pytestmark = on_gpu_or_interpreted
__all__ = ["poisoned"]

OPTIONS = {"feature_map": "relu", "normalizer": "ratio", "scale": 1.0, "eps": 1e-6}


def inputs_of(batch, queries, keys, heads, dim, value_dim, dtype=torch.bfloat16):
    """Views of a fused projection where the shapes allow it, and a gradient of the output."""
    if (queries, dim) == (keys, value_dim):
        q, k, v = torch.randn(batch, queries, 3, heads, dim).to(DEVICE, dtype).unbind(2)
    else:
        sizes = [(queries, dim), (keys, dim), (keys, value_dim)]
        q, k, v = (torch.randn(batch, n, heads, d).to(DEVICE, dtype) for n, d in sizes)
    return (q, k, v), torch.randn(batch, queries, heads, value_dim).to(DEVICE, dtype)


@pytest.fixture
def sweeps(monkeypatch):
    """How often a state is made in a backward pass."""
    calls = []
    for name in ("triton_bwd", "triton_bwd_wide"):
        module = importlib.import_module(f"lintra.kernels.linear_attention.{name}")

        def counted(*args, make=module.forward_state):
            calls.append(args)
            return make(*args)

        monkeypatch.setattr(module, "forward_state", counted)
    return calls


@pytest.mark.parametrize(
    ("dim", "normalizer", "dtype", "count"),
    [
        (144, "ratio", torch.float32, 0),
        (144, "none", torch.float32, 0),
        (144, "covariance", torch.float32, 1),
        (144, "ratio", torch.float16, 1),
        (24, "ratio", torch.float32, 1),
    ],
    ids=str,
)
def test_the_backward_pass_of_wide_heads_finds_the_state(dim, normalizer, dtype, count, sweeps):
    tensors, d_out = inputs_of(1, 20, 33, 1, dim, dim, dtype)
    options = OPTIONS | {"normalizer": normalizer}
    way = "wide" if dim > 128 else "split"
    operator = torch.ops.lintra.linear_attention_bwd
    with pinned(fwd_way=way, bwd_way=way):
        got = results(lambda *x: linear_attention(*x, impl="triton", **options), tensors, d_out)
        assert len(sweeps) == (count if DEVICE == "cpu" else len(sweeps))
        anew = operator(d_out, *tensors, *options.values())
    if DEVICE == "cpu":  # CUDA's backward runs in a thread that knows no pins
        for mine, other in zip(got[1:], anew, strict=True):
            assert torch.equal(mine, other)


def needs_hopper():
    if DEVICE != "cuda" or architecture(0) != 90:
        pytest.skip("needs a GPU of compute capability 9.0")


SHAPES = [
    (2, 197, 197, 2, 288, 288),
    (1, 4097, 65, 3, 288, 288),
    (3, 17, 300, 2, 192, 192),
    (1, 2048, 2048, 2, 256, 256),
    (2, 130, 70, 1, 320, 320),
    (1, 1024, 1024, 4, 144, 320),
    (2, 500, 500, 3, 288, 136),
    (16, 1024, 1024, 4, 288, 288),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("feature_map", ["relu", "elu1", "identity"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_for_hopper(shape, feature_map):
    from lintra.kernels.linear_attention.triton_bwd import linear_attention_bwd  # needs triton
    from lintra.kernels.linear_attention.triton_fwd import linear_attention_fwd_keeping

    needs_hopper()
    tensors, d_out = inputs_of(*shape)
    normalizer = "none" if feature_map == "identity" else "ratio"
    options = OPTIONS | {"feature_map": feature_map, "normalizer": normalizer, "scale": 0.3}

    def passes():
        # Not through autograd, which runs CUDA's backward in a thread that knows no pins.
        with pinned(fwd_way="wide", bwd_way="wide"):
            out, *kept = linear_attention_fwd_keeping(*tensors, *options.values())
            return out, *linear_attention_bwd(d_out, *tensors, *options.values(), *kept)

    first, second = passes(), passes()
    exact = results(
        lambda *x: linear_attention(*x, **options), [x.double() for x in tensors], d_out.double()
    )
    for place, (got, again, true) in enumerate(zip(first, second, exact, strict=True)):
        assert torch.equal(got, again), place
        error = (got.double() - true).abs().max()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps * true.abs().max(), place


@pytest.mark.gpu
def test_what_the_copy_engine_refuses_after_what_it_takes():
    needs_hopper()
    tensors, d_out = inputs_of(1, 700, 700, 2, 192, 192)
    shifted = [torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:] for x in tensors]
    shifted = [y.view(x.shape).copy_(x) for x, y in zip(tensors, shifted, strict=True)]
    want = results(linear_attention, tensors, d_out)
    for inputs in (shifted, [x.contiguous() for x in tensors], shifted):
        for got, true in zip(results(linear_attention, inputs, d_out), want, strict=True):
            torch.testing.assert_close(got, true, rtol=2e-2, atol=2e-2 * true.abs().max().item())
