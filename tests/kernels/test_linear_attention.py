"""Linear attention against measured cases, a float64 textbook form, and its own contract."""

import pytest
import torch
from torch.nn import functional as F

from family_members import MEMBERS
from golden_cases import case_names, fill_tensor, load_case, noise_tensor, tokens_first
from lintra.kernels import linear_attention
from lintra.kernels.linear_attention.reference import (
    FEATURE_MAPS,
    NORMALIZERS,
    is_linear_order_cheaper,
    linear_attention_reference,
)

SHAPES = [(1, 1, 1, 8), (2, 63, 3, 32), (1, 196, 4, 64), (2, 7, 2, 80)]


def textbook(query, key, value, feature_map, normalizer, scale, eps):
    """One output row at a time, from the definition."""
    phi = {"identity": lambda x: x, "relu": F.relu, "elu1": lambda x: 1 + F.elu(x)}[feature_map]
    rows = []
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            k, v = phi(key[b, :, h]), value[b, :, h]
            for i in range(query.shape[1]):
                weights = scale * (k @ phi(query[b, i, h]))  # (N)
                row = weights @ v
                if normalizer == "ratio":
                    row = row / (weights.sum() + eps)
                elif normalizer == "covariance":
                    row = (weights - weights.mean()) @ v / len(v) + v.mean(0)
                rows.append(row)
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    return torch.stack(rows).view(shape).transpose(1, 2)


def random_inputs(shape, dtype=torch.float64, num_keys=None, value_dim=None, seed=0):
    batch, length, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(length, dim), (num_keys or length, dim), (num_keys or length, value_dim or dim)]
    return [
        torch.randn(batch, n, heads, d, generator=generator, dtype=torch.float64).to(dtype)
        for n, d in sizes
    ]


def gradients(function, inputs, weight):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def run_golden_case(name, function):
    """`function(q, k, v, parameters)` on one stored case: output and all gradients must agree."""
    description, stored = load_case(name)
    inputs = [noise_tensor(description["inputs"][x], torch.float64) for x in ("q", "k", "v", "do")]
    if name.endswith("_dead"):
        inputs[0][0, 0, :4] = -inputs[0][0, 0, :4].abs()
        inputs[1][-1, -1] = -inputs[1][-1, -1].abs()
    q, k, v, do = map(tokens_first, inputs)
    specs = {key: spec for key, spec in description["parameters"].items() if key != "rule"}
    leaves = [q, k, v, *(fill_tensor(spec, torch.float64) for spec in specs.values())]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves[:3], dict(zip(specs, leaves[3:], strict=True)))
    grads = torch.autograd.grad((out * do).sum(), leaves)
    results = dict(zip(["dq", "dk", "dv", *(f"d{key}" for key in specs)], grads, strict=True))
    results["out"] = out
    assert set(results) == set(stored)
    for key, expected in stored.items():
        result = tokens_first(results[key]) if key in ("out", "dq", "dk", "dv") else results[key]
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)
    return out


@pytest.mark.parametrize("name", case_names("C_"))
def test_golden_case(name):
    out = run_golden_case(name, MEMBERS[name.removeprefix("C_").rsplit("_b", 1)[0]])
    if name.endswith("_dead"):
        assert (out[0, :4, 0] == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_textbook(shape, feature_map, normalizer):
    inputs = random_inputs(shape, num_keys=shape[1] + 4, value_dim=shape[3] + 3)
    expected = textbook(*inputs, feature_map, normalizer, scale=0.3, eps=1e-3)
    out = linear_attention(
        *inputs, feature_map=feature_map, normalizer=normalizer, scale=0.3, eps=1e-3
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_default_scale():
    q, k, v = random_inputs((1, 9, 2, 16))
    for normalizer, scale in {"ratio": 1.0, "none": 1.0, "covariance": 0.25}.items():
        default = linear_attention(q, k, v, normalizer=normalizer)
        assert torch.equal(default, linear_attention(q, k, v, normalizer=normalizer, scale=scale))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_both_orders_agree(feature_map, normalizer):
    inputs = random_inputs((2, 12, 2, 8), num_keys=9, value_dim=5)
    weight = torch.randn(2, 12, 2, 5, dtype=torch.float64)
    options = {"feature_map": feature_map, "normalizer": normalizer, "scale": 0.5, "eps": 1e-2}
    results = [
        gradients(
            lambda *x, order=order: linear_attention_reference(*x, linear_order=order, **options),
            inputs,
            weight,
        )
        for order in (True, False)
    ]
    for linear, quadratic in zip(*results, strict=True):
        torch.testing.assert_close(linear, quadratic, rtol=1e-10, atol=1e-11)


def test_order_follows_the_cost():
    assert is_linear_order_cheaper(65, 65, 64, 64)
    assert not is_linear_order_cheaper(64, 64, 64, 64)  # tie: quadratic
    assert not is_linear_order_cheaper(256, 256, 288, 288)  # LiT-XL at 256 px
    assert is_linear_order_cheaper(1024, 1024, 288, 288)  # at 512 px


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradcheck(feature_map, normalizer):
    inputs = [x.requires_grad_() for x in random_inputs((1, 5, 2, 4), num_keys=7)]
    assert torch.autograd.gradcheck(
        lambda *x: linear_attention(*x, feature_map=feature_map, normalizer=normalizer, eps=0.1),
        inputs,
    )


@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0, 100.0])
def test_covariance_keeps_float32_digits_at_large_means(mean):
    query, key, value = random_inputs((1, 4096, 1, 16))
    key, value = key + mean, value + mean
    options = {"feature_map": "identity", "normalizer": "covariance"}
    single = [x.float() for x in (query, key, value)]
    # The float64 twin of the rounded inputs: the error of the sums, not of the inputs.
    exact = linear_attention(*(x.double() for x in single), **options)
    error = (linear_attention(*single, **options) - exact).abs().max()
    assert error <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_half_inputs_lose_only_rounding(dtype, normalizer):
    # In float16 a sum of 4096 such features passes 65504 (spec numerics 2); all-zero queries too.
    query, key, value = random_inputs((1, 4096, 1, 72), dtype)
    query, key = query * 4, key * 4
    query[:, :3] = -query[:, :3].abs()
    scale = 1e-3 if normalizer == "none" else None
    out = linear_attention(query, key, value, normalizer=normalizer, scale=scale)
    exact = linear_attention(
        query.double(), key.double(), value.double(), normalizer=normalizer, scale=scale
    )
    assert out.dtype == dtype
    assert out.isfinite().all()
    error = (out.double() - exact).abs().max()
    assert error <= torch.finfo(dtype).eps * exact.abs().max()


def test_autocast_does_not_lower_the_state():
    inputs = random_inputs((1, 64, 2, 16), torch.float32)
    expected = linear_attention(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(*inputs), expected)


def test_views_of_a_fused_projection():
    qkv = torch.randn(2, 10, 3, 2, 8, dtype=torch.float64)
    views = qkv.unbind(2)
    copies = [x.contiguous() for x in views]
    assert torch.equal(linear_attention(*views), linear_attention(*copies))


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)])
def test_zero_sizes(shape):
    inputs = random_inputs(shape, torch.float32)
    assert linear_attention(*inputs).shape == shape


def test_no_keys():
    query, key, value = torch.randn(1, 3, 2, 8), torch.zeros(1, 0, 2, 8), torch.zeros(1, 0, 2, 8)
    assert (linear_attention(query, key, value) == 0).all()
    with pytest.raises(ValueError, match="`key` must hold at least one token"):
        linear_attention(query, key, value, normalizer="covariance")


def test_compiles_without_a_graph_break():
    inputs = random_inputs((2, 20, 2, 8), torch.float32)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), linear_attention(*inputs))


GOOD = torch.zeros(2, 5, 3, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"feature_map": "sin"}, ValueError, "`feature_map` must be one of identity, relu, elu1"),
        ({"normalizer": "l2"}, ValueError, "`normalizer` must be one of ratio, covariance, none"),
        ({"impl": "cuda"}, ValueError, "`impl` must be one of auto, reference, triton"),
        ({"query": [1.0]}, TypeError, "`query` must be a tensor, got list"),
        ({"query": GOOD[0]}, ValueError, r"`query` must have shape \(B, M, H, D\), got"),
        ({"key": GOOD[:, :, :2]}, ValueError, r"`key` must have shape .* = \(2, 5, 3, 8\), got"),
        ({"value": GOOD[:, :4]}, ValueError, r"`value` must have shape .* = \(2, 5, 3, 8\), got"),
        (
            {"query": GOOD.long()},
            TypeError,
            "`query` must be float16, bfloat16, .* got torch.int64",
        ),
        ({"key": GOOD.half()}, TypeError, "`key` must have dtype torch.float32, got torch.float16"),
        ({"value": GOOD.to("meta")}, ValueError, "`value` must be on cpu, got meta"),
        (
            {"impl": "triton"} | dict.fromkeys(("query", "key", "value"), GOOD.double()),
            NotImplementedError,
            "`impl` must not be 'triton' .* kernels take float16, .*, got torch.float64",
        ),
        (
            {"impl": "triton"}
            | dict.fromkeys(("query", "key", "value"), torch.zeros(1, 1, 1, 321)),
            NotImplementedError,
            "`impl` must not be 'triton' .* take 1 to 320 head channels, got 321",
        ),
        (
            {"impl": "triton", "value": torch.zeros(2, 5, 3, 321)},
            NotImplementedError,
            "`impl` must not be 'triton' .* take 1 to 320 value channels, got 321",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(changes, error, message):
    arguments = {"query": GOOD, "key": GOOD, "value": GOOD} | changes
    with pytest.raises(error, match=message):
        linear_attention(**arguments)
