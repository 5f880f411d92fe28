"""Local attention against a dense textbook form and against the numbers of CLEAR's own mask."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden_cases import case_names, fill_tensor, load_case, noise_tensor, tokens_first
from lintra.kernels import local_attention
from lintra.kernels.local_attention import tiles


def visible_keys(grid, radius, num_prefix=0, num_extra=0) -> Tensor:
    """(N, N + M), true where the query sees the key."""
    height, width = grid
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    distance = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    num_tokens = num_prefix + height * width
    visible = torch.ones(num_tokens, num_tokens + num_extra, dtype=torch.bool)
    visible[num_prefix:, num_prefix:num_tokens] = distance.double() < radius**2
    visible[:num_prefix, num_tokens:] = False
    return visible


def attend(query, key, value, visible, scale=None) -> tuple[Tensor, Tensor]:
    """Dense softmax attention and log-sum-exp, in the dtype of the inputs."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    out = torch.einsum("bhij,bjhe->bihe", scores.softmax(-1), value)
    return out, scores.logsumexp(-1).transpose(1, 2)


def textbook(query, key, value, extra_key, extra_value, *, grid, radius, num_prefix=0, scale=None):
    visible = visible_keys(grid, radius, num_prefix, extra_key.shape[1])
    keys, values = torch.cat([key, extra_key], 1), torch.cat([value, extra_value], 1)
    return attend(query, keys, values, visible, scale)


def operation(query, key, value, extra_key, extra_value, **kwargs) -> tuple[Tensor, Tensor]:
    extra = {"extra_key": extra_key, "extra_value": extra_value} if extra_key.shape[1] else {}
    return local_attention(query, key, value, **extra, return_lse=True, **kwargs)


def random_inputs(
    grid=(5, 7), num_prefix=0, num_extra=0, *, batch=2, heads=2, head_dim=4, value_dim=None, seed=0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_tokens, value_dim = num_prefix + grid[0] * grid[1], value_dim or head_dim
    sizes = [(num_tokens, head_dim)] * 2 + [(num_tokens, value_dim)]
    sizes += [(num_extra, head_dim), (num_extra, value_dim)]
    return [
        torch.randn(batch, tokens, heads, dim, generator=generator, dtype=torch.float64)
        for tokens, dim in sizes
    ]


def with_gradients(function, inputs, **kwargs) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients of a sum that weighs every number of both."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = function(*inputs, **kwargs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    grads = torch.autograd.grad(results, inputs, weights, materialize_grads=True)
    return [*results, *grads]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of the stored numbers, in units of the largest of them."""
    assert actual.shape == expected.shape
    if expected.numel():
        tolerance = 1e-12 if expected.dtype == torch.float64 else torch.finfo(expected.dtype).eps
        error = (actual.double() - expected.double()).abs().max()
        assert error <= tolerance * max(1.0, expected.abs().max().item())


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("name", case_names("B_local"))
def test_clear_mask(name):
    case, stored = load_case(name)
    config, specs = case["config"], case["inputs"]
    q, k, v, do = (
        tokens_first(noise_tensor(specs[x]).double()).requires_grad_()
        for x in ("q", "k", "v", "do")
    )
    grid = config["height"], config["width"]
    for radius in config["radii"]:
        kwargs = {"grid": grid, "radius": radius, "num_prefix": config["text"]}
        out, lse = local_attention(q, k, v, **kwargs, scale=config["scale"], return_lse=True)
        gradients = torch.autograd.grad(out, (q, k, v), do)
        actual = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True))
        for key, value in actual.items():
            assert_near(tokens_first(value), stored[f"r{radius}.{key}"])
        # With all logits zero, exp(lse) counts the visible keys.
        count = local_attention(q * 0, k, v, **kwargs, return_lse=True)[1].exp().round().int()
        assert torch.equal(count, stored[f"r{radius}.visible"][None, :, None].expand_as(count))


@pytest.mark.parametrize("name", case_names("B_pooled"))
def test_clear_mask_with_pooled_keys(name):
    case, stored = load_case(name)
    config, specs = case["config"], case["inputs"]
    text, height, width = config["text"], config["height"], config["width"]
    factor = config["down_factor"]
    q, k, v, do = (noise_tensor(specs[x]).double().requires_grad_() for x in ("q", "k", "v", "do"))
    weight = fill_tensor(specs["spatial_weight"]).double().requires_grad_()

    def pool(tokens: Tensor) -> Tensor:
        blocks = tokens[:, :, text:].unflatten(
            2, (height // factor, factor, width // factor, factor)
        )
        return (blocks * weight).sum((3, 5)).flatten(2, 3)

    pooled = pool(k), pool(v)
    assert_same(list(pooled), [stored["k_pooled"], stored["v_pooled"]])
    out, lse = local_attention(
        *map(tokens_first, (q, k, v)),
        grid=(height, width),
        radius=config["radius"],
        num_prefix=text,
        scale=config["scale"],
        extra_key=tokens_first(pooled[0]),
        extra_value=tokens_first(pooled[1]),
        return_lse=True,
    )
    out, lse = tokens_first(out), tokens_first(lse)
    gradients = torch.autograd.grad(out, (q, k, v, weight), do)
    names = ("out", "lse", "dq", "dk", "dv", "dspatial_weight")
    assert_same([out, lse, *gradients], [stored[x] for x in names])
    visible = visible_keys((height, width), config["radius"], text, pooled[0].shape[2])
    assert torch.equal(visible.sum(1).int(), stored["visible"])


sides = st.integers(1, 21)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    grid=st.tuples(sides, sides),
    num_prefix=st.integers(0, 5),
    num_extra=st.integers(0, 4),
    radius=st.one_of(st.integers(1, 12), st.floats(1, 12), st.sampled_from([1e200, float("inf")])),
    scale=st.sampled_from([None, 0.7, -1]),
    dims=st.tuples(*[st.integers(1, 3)] * 4),
)
def test_textbook(grid, num_prefix, num_extra, radius, scale, dims):
    batch, heads, head_dim, value_dim = dims
    inputs = random_inputs(
        grid,
        num_prefix,
        num_extra,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        value_dim=value_dim,
    )
    kwargs = {"grid": grid, "num_prefix": num_prefix, "scale": scale}
    actual = with_gradients(operation, inputs, radius=radius, **kwargs)
    expected = with_gradients(textbook, inputs, radius=min(radius, 100), **kwargs)
    assert_same(actual, expected)


@pytest.mark.parametrize("radius", [5**0.5, 13**0.5, 5**0.5 - 1e-12, 5**0.5 + 1e-12])
def test_radius_is_compared_in_double_precision(radius):
    inputs = random_inputs((9, 10))
    kwargs = {"grid": (9, 10), "radius": radius}
    assert_same([*operation(*inputs, **kwargs)], [*textbook(*inputs, **kwargs)])


@pytest.mark.parametrize("budget", [1, 400_000, 600_000, 3_000_000])
def test_any_memory_budget(monkeypatch, budget):
    """Few bytes cut samples, heads, keys of prefix queries; more put several tiles together."""
    monkeypatch.setattr(tiles, "CPU_BYTES", budget)
    inputs = random_inputs((34, 41), 6, 3, batch=2, heads=3)
    kwargs = {"grid": (34, 41), "radius": 2.5, "num_prefix": 6}
    assert_same(
        with_gradients(operation, inputs, **kwargs), with_gradients(textbook, inputs, **kwargs)
    )


def test_parts_of_the_keys_merge_by_lse():
    """Disc and first extra keys in one call, other keys and the other extra keys in another."""
    grid = (6, 9)
    query, key, value, *extra = random_inputs(grid, num_extra=6)
    inputs = [query, key, value, *random_inputs(grid, seed=1)[1:3], *extra]

    def merged(query, key, value, key2, value2, extra_key, extra_value):
        (k1, k2), (v1, v2) = extra_key.split([2, 4], 1), extra_value.split([2, 4], 1)
        out1, lse1 = operation(query, key, value, k1, v1, grid=grid, radius=3.2)
        out2, lse2 = operation(query, key2, value2, k2, v2, grid=grid, radius=1)
        lse = torch.logaddexp(lse1, lse2)
        return sum(
            part * (part_lse - lse).exp()[..., None]
            for part, part_lse in ((out1, lse1), (out2, lse2))
        ), lse

    def whole(query, key, value, key2, value2, extra_key, extra_value):
        keys, values = (
            torch.cat([key, key2, extra_key], 1),
            torch.cat([value, value2, extra_value], 1),
        )
        visible = torch.cat([visible_keys(grid, 3.2), visible_keys(grid, 1, num_extra=6)], 1)
        return attend(query, keys, values, visible)

    assert_same(with_gradients(merged, inputs), with_gradients(whole, inputs))


def test_gradcheck():
    inputs = [
        x.requires_grad_() for x in random_inputs((2, 3), 2, 2, batch=1, head_dim=3, value_dim=2)
    ]
    assert torch.autograd.gradcheck(
        lambda *x: operation(*x, grid=(2, 3), radius=1.5, num_prefix=2), inputs
    )


def test_second_derivative_raises():
    query, key, value, *_ = random_inputs()
    query.requires_grad_()
    out = local_attention(query, key, value, grid=(5, 7), radius=2)
    (gradient,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(
        NotImplementedError, match="`local_attention` must be differentiated only onc"
    ):
        gradient.sum().backward()


def test_views_of_a_fused_projection():
    qkv = torch.randn(2, 3 + 35, 3 * 2 * 4, dtype=torch.float64, requires_grad=True)
    kwargs = {"grid": (5, 7), "radius": 2.5, "num_prefix": 3}

    def gradient(change) -> list[Tensor]:
        query, key, value = qkv.unflatten(2, (3, 2, 4)).unbind(2)
        out = local_attention(change(query), change(key), change(value), **kwargs)
        return [out, *torch.autograd.grad(out.square().sum(), qkv)]

    expected = gradient(lambda x: x.contiguous())
    assert_same(gradient(lambda x: x), expected)
    assert_same(gradient(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_three_way_error(dtype):
    inputs = [x.to(dtype) for x in random_inputs((9, 11), 4, 3, head_dim=16)]
    kwargs = {"grid": (9, 11), "radius": 3.5, "num_prefix": 4}
    exact = with_gradients(textbook, [x.double() for x in inputs], **kwargs)
    actual = with_gradients(operation, inputs, **kwargs)
    plain = with_gradients(textbook, inputs, **kwargs)
    assert actual[1].dtype == torch.float32
    assert all(x.dtype == dtype for x in (actual[0], *actual[2:]))
    for ours, theirs, reference in zip(actual, plain, exact, strict=True):
        error, bound = ((x.double() - reference).abs().max() for x in (ours, theirs))
        assert error <= 2 * bound + torch.finfo(dtype).eps * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_inputs_stay_finite(dtype):
    inputs = [(200 * x).to(dtype) for x in random_inputs((6, 6), 2, 2, head_dim=16)]
    results = operation(*inputs, grid=(6, 6), radius=3, num_prefix=2)
    assert results[1].max() > torch.finfo(torch.float16).max
    assert all(x.isfinite().all() for x in results)


def test_autocast_changes_nothing():
    inputs = [x.float() for x in random_inputs((6, 6), 2, 2)]
    kwargs = {"grid": (6, 6), "radius": 3, "num_prefix": 2}
    expected = with_gradients(operation, inputs, **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = with_gradients(operation, inputs, **kwargs)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_empty_batch():
    results = with_gradients(
        operation,
        random_inputs(num_prefix=3, num_extra=2, batch=0),
        grid=(5, 7),
        radius=2,
        num_prefix=3,
    )
    assert [x.shape[0] for x in results] == [0] * 7


def test_return_lse_and_implementations():
    query, key, value, *_ = random_inputs()
    kwargs = {"grid": (5, 7), "radius": 2}
    out = local_attention(query, key, value, **kwargs)
    again, lse = local_attention(query, key, value, **kwargs, return_lse=True, impl="reference")
    assert torch.equal(out, again)
    assert lse.shape == query.shape[:3]


def test_compiles_into_one_graph_at_any_size():
    def function(query, key, value, image):
        grid = tuple(image.shape)
        num_prefix = query.shape[1] - grid[0] * grid[1]
        return local_attention(
            query, key, value, grid=grid, radius=2.5, num_prefix=num_prefix, return_lse=True
        )

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid, num_prefix in (((5, 6), 2), ((9, 13), 3)):
        image, inputs = torch.zeros(grid), random_inputs(grid, num_prefix)[:3]
        actual = with_gradients(compiled, inputs, image=image)
        assert_same(actual, with_gradients(function, inputs, image=image))


def test_opcheck():
    inputs, numbers = random_inputs((3, 9), 2, 1), (3, 9, 2, 2.0, 0.5)
    operators = torch.ops.lintra
    torch.library.opcheck(operators.local_attention_reference_fwd.default, (*inputs, *numbers))
    out, lse = operators.local_attention_reference_fwd(*inputs, *numbers)
    arguments = (*inputs, out, lse, out, lse, *numbers)
    torch.library.opcheck(operators.local_attention_reference_bwd.default, arguments)


BIG_CASE = """
import pathlib, re, time, torch
from lintra.kernels import local_attention

height, width, num_prefix, heads, dim = 128, 128, 512, 4, 64
num_tokens = num_prefix + height * width
status = pathlib.Path("/proc/self/status")  # ru_maxrss begins at the size of the parent
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1]) * 1024
torch.randn(64, 64) @ torch.randn(64, 64)
before, start = peak(), time.perf_counter()
shape = 1, num_tokens, heads, dim
query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
out = local_attention(
    query, key, value, grid=(height, width), radius=16, num_prefix=num_prefix
)
out.square().sum().backward()
print(f"{time.perf_counter() - start:.1f} s, {(peak() - before) / 1e6:.0f} MB")
assert peak() - before < num_tokens**2 * 4 / 2, peak() - before
"""


def test_memory_at_user_scale():
    """All of inputs, gradients and work in less than half of one N x N matrix (1142 MB)."""
    result = subprocess.run([sys.executable, "-c", BIG_CASE], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stderr


def changed(**changes) -> dict:
    query, key, value, extra_key, extra_value = random_inputs(num_prefix=3, num_extra=2)
    arguments = {"query": query, "key": key, "value": value, "grid": (5, 7), "radius": 2}
    arguments |= {"num_prefix": 3, "extra_key": extra_key, "extra_value": extra_value}
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"impl": "cuda"}, ValueError, "`impl` must be one of auto, reference, triton, got 'cuda'"),
        (
            {"impl": "triton"},
            NotImplementedError,
            "`impl` must not be 'triton' .*got torch.float64",
        ),
        ({"query": torch.zeros(2, 38, 8)}, ValueError, r"`query` must have shape \(B, N, H, D\)"),
        ({"query": [1.0]}, TypeError, "`query` must be a tensor, got list"),
        ({"key": torch.zeros(2, 38, 2, 4)}, TypeError, "`key` must have dtype torch.float64"),
        ({"value": torch.zeros(2, 38, 2, 4).int()}, TypeError, "`value` must be float16"),
        ({"value": random_inputs()[2].to("meta")}, ValueError, "`value` must be on cpu, got meta"),
        ({"key": random_inputs()[1]}, ValueError, r"`key` must have shape .*\(2, 38, 2, 4\), got"),
        (
            {"value": random_inputs()[2]},
            ValueError,
            r"`value` must have shape .*\(2, 38, 2, 4\), got",
        ),
        ({"num_prefix": 1.5}, TypeError, "`num_prefix` must be an integer, got float"),
        ({"num_prefix": -1}, ValueError, r"`num_prefix` must be in \[0, 38\), got -1"),
        ({"num_prefix": 38}, ValueError, r"`num_prefix` must be in \[0, 38\), got 38"),
        ({"grid": (5, 8)}, ValueError, "`grid` must hold the 35 image tokens, got 5 x 8 = 40"),
        ({"grid": (0, 7)}, ValueError, "`grid` must be two positive sides"),
        ({"radius": "2"}, TypeError, "`radius` must be a number, got str"),
        ({"radius": True}, TypeError, "`radius` must be a number, got bool"),
        ({"radius": 0.99}, ValueError, "`radius` must be at least 1, got 0.99"),
        ({"radius": float("nan")}, ValueError, "`radius` must be at least 1, got nan"),
        ({"scale": torch.ones(())}, TypeError, "`scale` must be a number or None, got Tensor"),
        ({"extra_key": None}, ValueError, "`extra_key` must be given together with `extra_value`"),
        (
            {"extra_value": None},
            ValueError,
            "`extra_value` must be given together with `extra_key`",
        ),
        ({"extra_key": random_inputs()[3][:1]}, ValueError, "`extra_key` must have shape"),
        ({"extra_key": torch.zeros(2, 2, 2, 4)}, TypeError, "`extra_key` must have dtype"),
        ({"extra_value": random_inputs()[4]}, ValueError, "`extra_value` must have shape"),
        ({"extra_value": torch.zeros(2, 2, 2, 4)}, TypeError, "`extra_value` must have dtype"),
    ],
)
def test_errors(changes, error, message):
    local_attention(**changed())
    with pytest.raises(error, match=message):
        local_attention(**changed(**changes))
