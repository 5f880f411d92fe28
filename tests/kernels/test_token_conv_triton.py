"""The Triton kernels of the token convolution against the reference, and as PyTorch operators."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernel_checks import DEVICE, assert_three_way, on_gpu_or_interpreted, poisoned, results
from lintra.kernels import token_conv2d
from lintra.kernels._common.pinning import pinned
from lintra.kernels.token_conv.configs import Launch, groups_of, rows_of

pytestmark = on_gpu_or_interpreted
__all__ = ["poisoned"]


def inputs_of(
    grid, channels, size, per_sample, dtype=torch.float32, batch=2, parameters=None, filters=None,
    prefix=0,
):  # fmt: skip
    tokens, residual, d_out = (
        torch.randn(batch, prefix + grid[0] * grid[1], channels).to(DEVICE, dtype) for _ in range(3)
    )
    weight = torch.randn(*([batch] if per_sample else []), filters or channels, size, size)
    bias = torch.randn(filters or channels).to(DEVICE, parameters or dtype)
    return [tokens, weight.to(DEVICE, parameters or dtype), bias, residual], d_out


def compare(inputs, d_out, grid, prefix=0):
    def run(impl):
        def function(tokens, weight, bias=None, residual=None):
            return token_conv2d(
                tokens, weight, bias, grid=grid, residual=residual, num_prefix_tokens=prefix,
                impl=impl,
            )  # fmt: skip

        return function

    assert_three_way(run("triton"), run("reference"), inputs, d_out)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
@pytest.mark.parametrize(
    ("grid", "channels", "size"),
    [((1, 1), 3, 3), ((5, 3), 6, 1), ((3, 4), 66, 3), ((4, 17), 5, 5), ((1, 2), 4, 7)],
    ids=str,
)
def test_against_the_reference(grid, channels, size, per_sample):
    inputs, d_out = inputs_of(grid, channels, size, per_sample)
    compare(inputs, d_out, grid)
    compare(inputs[:2], d_out, grid)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
@pytest.mark.parametrize("size", [3, 5])
def test_shared_filters_and_prefix_tokens(size, per_sample):
    inputs, d_out = inputs_of((3, 4), 12, size, per_sample, filters=4, prefix=2)
    compare(inputs, d_out, (3, 4), prefix=2)
    compare(inputs[:2], d_out, (3, 4), prefix=2)


@pytest.mark.usefixtures("poisoned")
def test_few_rows_and_few_groups_a_program():
    inputs, d_out = inputs_of((8, 3), 6, 3, False, batch=3)
    launch = Launch((4,), 16, 2, 1, programs=1)
    assert rows_of(132, 2, 8, 3) == 4
    with pinned(conv_fwd=launch, conv_bwd_weight=launch):
        compare(inputs, d_out, (8, 3))
    assert groups_of(1, 6 * 1 / 16, 3) == 2
    with pinned(conv_bwd_weight=replace(launch, programs=0)):
        compare(inputs[:2], d_out, (8, 3))


def test_programs_fill_whole_waves():
    # Rows: one wave of 1344 programs; a fourth range would start another one.
    assert rows_of(1584, 448, 56, 5) == 19
    assert rows_of(1584, 1536, 14, 5) == 14
    # Two samples a program are one wave instead of two, and half of the partial sums.
    assert groups_of(1056, 6.0, 256) == 128
    assert groups_of(1056, 1.5, 4096) == 683
    assert groups_of(1056, 6.0, 0) == 0


def test_only_the_gradients_asked_for():
    (tokens, weight, bias, _), d_out = inputs_of((3, 4), 4, 3, False)
    for leaf in (tokens, weight, bias):
        leaf.requires_grad_()
        out = token_conv2d(tokens, weight, bias, grid=(3, 4), impl="triton")
        expected = token_conv2d(tokens, weight, bias, grid=(3, 4), impl="reference")
        (grad,), (same,) = (torch.autograd.grad(x, leaf, d_out) for x in (out, expected))
        torch.testing.assert_close(grad, same)
        leaf.requires_grad_(False)


def test_float32_parameters_meet_half_tokens():
    (tokens, weight, bias, _), d_out = inputs_of(
        (3, 4), 8, 3, False, torch.float16, parameters=torch.float32
    )
    compare([tokens, weight, bias], d_out, (3, 4))


def test_strided_tokens_and_empty_batch():
    qkv = torch.randn(2, 12, 3, 8, device=DEVICE)
    weight, d_out = torch.randn(8, 3, 3, device=DEVICE), torch.randn(2, 12, 8, device=DEVICE)
    compare([qkv[:, :, 2], weight], d_out, (3, 4))
    compare([qkv[:0, :, 2], weight], d_out[:0], (3, 4))


def test_operators_pass_opcheck():
    (tokens, weight, bias, residual), d_out = inputs_of((3, 4), 4, 3, True)
    ops = torch.ops.lintra
    torch.library.opcheck(ops.token_conv2d_fwd.default, (tokens, weight, bias, residual, 0, 3, 4))
    torch.library.opcheck(ops.token_conv2d_fwd.default, (tokens, weight, None, None, 0, 3, 4))
    for more in (None, tokens):
        arguments = (d_out, weight, more, 0, 3, 4)
        torch.library.opcheck(ops.token_conv2d_bwd_tokens.default, arguments)
    torch.library.opcheck(ops.token_conv2d_bwd_weight.default, (d_out, tokens, 4, 3, True, 0, 3, 4))


def test_a_second_derivative_is_refused():
    tokens = torch.randn(1, 12, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(4, 3, 3, device=DEVICE, requires_grad=True)
    out = token_conv2d(tokens, weight, grid=(3, 4), impl="triton")
    for leaf in (tokens, weight):
        (grad,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="`token_conv2d` must be differentiated"):
            grad.sum().backward(retain_graph=True)


def test_meta_tensors_have_shapes_only():
    tokens, weight = torch.empty(2, 12, 4, device="meta"), torch.empty(4, 3, 3, device="meta")
    out = token_conv2d(tokens, weight, grid=(3, 4), impl="triton")
    assert out.shape == (2, 12, 4)
    assert out.is_meta


def test_compiles_once_for_all_grids():
    counter = CompileCounterWithBackend("aot_eager")

    def eager(tokens, weight, height, width):
        return token_conv2d(tokens, weight, grid=(height, width), impl="triton")

    function = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for grid in ((3, 4), (5, 6), (7, 5)):
        (tokens, weight, _, _), d_out = inputs_of(grid, 4, 3, False)
        compiled, plain = (
            results(lambda *x, f=f, grid=grid: f(*x, *grid), [tokens, weight], d_out)
            for f in (function, eager)
        )
        for a, b in zip(compiled, plain, strict=True):
            torch.testing.assert_close(a, b)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_what_cannot_be_differentiated_says_so():
    (tokens, weight, _, _), _ = inputs_of((3, 4), 4, 3, False)
    with pytest.raises(NotImplementedError, match="neither torch.func nor forward-mode"):
        torch.func.grad(lambda x: token_conv2d(x, weight, grid=(3, 4), impl="triton").sum())(tokens)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
@pytest.mark.parametrize(
    ("grid", "channels", "size"),
    [((14, 14), 192, 5), ((7, 7), 96, 7), ((33, 65), 72, 3), ((33, 65), 72, 5), ((1, 50), 17, 1)],
    ids=str,
)
def test_shapes_on_gpu(grid, channels, size, per_sample, dtype):
    inputs, d_out = inputs_of(grid, channels, size, per_sample, dtype, batch=3)
    compare(inputs, d_out, grid)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    tokens = torch.zeros(2, 2**20, 1088, dtype=torch.bfloat16, device="cuda")  # 2.3e9 elements
    d_out = torch.zeros_like(tokens)
    tokens[-1, -1], d_out[-1, -1] = torch.randn(2, 1088, device="cuda").bfloat16()
    weight = torch.randn(1088, 3, 3, device="cuda", requires_grad=True)
    tokens.requires_grad_()
    out = token_conv2d(tokens, weight, grid=(1024, 1024), impl="triton")
    d_tokens, d_weight = torch.autograd.grad(out, (tokens, weight), d_out)
    last, centre = tokens[-1, -1].double(), weight[:, 1, 1].double()
    torch.testing.assert_close(out[-1, -1], (last * centre).bfloat16())
    torch.testing.assert_close(d_tokens[-1, -1], (d_out[-1, -1] * centre).bfloat16())
    torch.testing.assert_close(d_weight[:, 1, 1], (last * d_out[-1, -1]).float())


@pytest.mark.gpu
@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
def test_runs_in_a_cuda_graph(per_sample):
    inputs, d_out = inputs_of((7, 9), 24, 3, per_sample, torch.bfloat16, prefix=1)
    leaves = [x.requires_grad_() for x in inputs]

    def step():
        tokens, weight, bias, residual = leaves
        out = token_conv2d(
            tokens, weight, bias, grid=(7, 9), residual=residual, num_prefix_tokens=1
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (*leaves, d_out):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)
