"""Depthwise token convolution against a float64 textbook form and its own contract.

The measured cases with a convolution (C_relu_lit_dwc_*) run in test_linear_attention.py.
"""

import pytest
import torch

from lintra.kernels import token_conv2d


def textbook(tokens, weight, bias, grid, residual):
    """One output pixel at a time, from the definition."""
    height, width = grid
    size = weight.shape[-1]
    out = torch.zeros_like(tokens)
    for y in range(height):
        for x in range(width):
            for dy in range(size):
                for dx in range(size):
                    row, column = y + dy - size // 2, x + dx - size // 2
                    if 0 <= row < height and 0 <= column < width:
                        out[:, y * width + x] += (
                            weight[..., dy, dx] * tokens[:, row * width + column]
                        )
    out = out if bias is None else out + bias
    return out if residual is None else out + residual


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (4, 9)], ids=str)
@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias_and_residual"])
def test_textbook(grid, size, per_sample, extras):
    tokens = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64)
    weight = torch.randn(*([2] if per_sample else []), 6, size, size, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64) if extras else None
    residual = torch.randn_like(tokens) if extras else None
    out = token_conv2d(tokens, weight, bias, grid=grid, residual=residual)
    torch.testing.assert_close(out, textbook(tokens, weight, bias, grid, residual))


@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
def test_filters_shared_by_heads(per_sample):
    tokens = torch.randn(2, 12, 6, dtype=torch.float64)
    weight = torch.randn(*([2] if per_sample else []), 2, 3, 3, dtype=torch.float64)
    bias = torch.randn(2, dtype=torch.float64)
    out = token_conv2d(tokens, weight, bias, grid=(3, 4))
    expected = textbook(tokens, torch.cat([weight] * 3, -3), bias.repeat(3), (3, 4), None)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("with_residual", [False, True])
def test_prefix_tokens_are_the_residual(with_residual):
    tokens, weight = torch.randn(2, 15, 6), torch.randn(6, 3, 3)
    residual = torch.randn(2, 15, 6) if with_residual else torch.zeros(2, 15, 6)
    arguments = {"grid": (3, 4), "residual": residual if with_residual else None}
    out = token_conv2d(tokens, weight, num_prefix_tokens=3, **arguments)
    patches = token_conv2d(tokens[:, 3:], weight, grid=(3, 4), residual=residual[:, 3:])
    assert torch.equal(out, torch.cat([residual[:, :3], patches], 1))


@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
def test_gradcheck(per_sample):
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 7, 4), (2, 2, 3, 3) if per_sample else (2, 3, 3), (2,), (2, 7, 4))
    ]
    assert torch.autograd.gradcheck(
        lambda t, w, b, r: token_conv2d(t, w, b, grid=(2, 3), residual=r, num_prefix_tokens=1),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
def test_half_inputs_lose_only_the_final_rounding(dtype, per_sample):
    tokens, residual = (torch.randn(2, 35, 8).to(dtype) for _ in range(2))
    weight = torch.randn(*([2] if per_sample else []), 8, 5, 5).to(dtype)
    out = token_conv2d(tokens, weight, grid=(5, 7), residual=residual)
    exact = token_conv2d(tokens.double(), weight.double(), grid=(5, 7), residual=residual.double())
    assert out.dtype == dtype
    error = (out.double() - exact).abs().max()
    assert error <= torch.finfo(dtype).eps * exact.abs().max()


def test_float32_parameters_meet_half_tokens():
    # What autocast gives a module: half activations, float32 parameters, no rounding of these.
    tokens, weight, bias = torch.randn(1, 9, 4).half(), torch.randn(4, 3, 3), torch.randn(4)
    out = token_conv2d(tokens, weight, bias, grid=(3, 3))
    exact = token_conv2d(tokens.double(), weight.double(), bias.double(), grid=(3, 3))
    torch.testing.assert_close(out, exact.half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_conv2d(tokens, weight, bias, grid=(3, 3)), out)


def test_strided_tokens_and_empty_batch():
    qkv = torch.randn(2, 12, 3, 8)
    view, weight = qkv[:, :, 2], torch.randn(8, 3, 3)
    expected = token_conv2d(view.contiguous(), weight, grid=(3, 4))
    torch.testing.assert_close(token_conv2d(view, weight, grid=(3, 4)), expected)
    for kernel in (weight, torch.randn(0, 8, 3, 3)):
        assert token_conv2d(view[:0], kernel, grid=(3, 4)).shape == (0, 12, 8)


def test_compiles_without_a_graph_break():
    tokens, weight = torch.randn(2, 12, 4), torch.randn(2, 4, 3, 3)
    compiled = torch.compile(token_conv2d, fullgraph=True, backend="eager")
    expected = token_conv2d(tokens, weight, grid=(3, 4))
    torch.testing.assert_close(compiled(tokens, weight, grid=(3, 4)), expected)


TOKENS, WEIGHT = torch.zeros(2, 12, 4), torch.zeros(4, 3, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grid": (3, 5)}, ValueError, "`grid` must hold the 12 tokens, got 3 x 5 = 15"),
        ({"grid": (12,)}, ValueError, r"`grid` must be two positive sides .* got \(12,\)"),
        ({"grid": (-3, -4)}, ValueError, r"`grid` must be two positive sides .* got \(-3, -4\)"),
        ({"tokens": TOKENS[0]}, ValueError, r"`tokens` must have shape \(B, N, C\), got"),
        ({"weight": WEIGHT[0]}, ValueError, r"`weight` must have shape \(F, k, k\), got"),
        ({"weight": WEIGHT[:3]}, ValueError, "`weight` must have filters that divide the 4 .* 3"),
        ({"weight": WEIGHT[:0]}, ValueError, "`weight` must have filters that divide the 4 .* 0"),
        ({"weight": WEIGHT[..., :1]}, ValueError, r"`weight` must have shape .* = \(4, 1, 1\)"),
        ({"num_prefix_tokens": -1}, ValueError, "`num_prefix_tokens` must be 0 or more, got -1"),
        ({"num_prefix_tokens": 1}, ValueError, "`grid` must hold the 11 tokens, got 3 x 4 = 12"),
        ({"weight": WEIGHT[:, :2, :2]}, ValueError, "`weight` must have an odd kernel size, got 2"),
        (
            {"weight": torch.zeros(1, 4, 3, 3)},
            ValueError,
            r"`weight` must have shape \(B, F, k, k\) = \(2, 4, 3, 3\), got \(1, 4, 3, 3\)",
        ),
        ({"weight": WEIGHT.int()}, TypeError, "`weight` must be float16, .* got torch.int32"),
        ({"bias": torch.zeros(3)}, ValueError, r"`bias` must have shape \(F\) = \(4,\), got"),
        ({"residual": TOKENS[:, :3]}, ValueError, "`residual` must have shape"),
        ({"residual": TOKENS.half()}, TypeError, "`residual` must have dtype torch.float32"),
        (
            {"impl": "triton", "tokens": TOKENS.double()},
            NotImplementedError,
            "`impl` must not be 'triton' .* kernels take float16, .*, got torch.float64",
        ),
        (
            {"impl": "triton", "weight": torch.zeros(4, 9, 9)},
            NotImplementedError,
            "`impl` must not be 'triton' .* take sizes up to 7, got 9",
        ),
    ],
)
def test_errors(changes, error, message):
    arguments = {"tokens": TOKENS, "weight": WEIGHT, "grid": (3, 4)} | changes
    with pytest.raises(error, match=message):
        token_conv2d(**arguments)
