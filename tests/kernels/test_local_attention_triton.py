"""The Triton kernels of local attention against the reference, and as PyTorch operators."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from golden_cases import case_names, load_case, noise_tensor, tokens_first
from kernel_checks import DEVICE, on_gpu_or_interpreted, poisoned
from lintra.kernels import local_attention
from lintra.kernels._common.pinning import pinned
from lintra.kernels.local_attention import configs
from lintra.kernels.local_attention.configs import Launch

pytestmark = on_gpu_or_interpreted
__all__ = ["poisoned"]

# Small tiles: many of them, whole, cut and skipped, on grids that the interpreter can do.
SMALL = {
    "local_fwd": Launch((4, 4), (2, 8), 4, 1),
    "local_bwd_dq": Launch((4, 4), (2, 8), 4, 1),
    "local_bwd_dkv": Launch((2, 8), (4, 4), 4, 1),
    "local_parts": 3,
}


def inputs_of(
    grid, num_prefix=0, num_extra=0, *, batch=1, heads=1, dim=16, value_dim=None, dtype=None, seed=0
) -> list[Tensor]:
    """Query, key, value, extra key and value; views of a fused projection where shapes allow it."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, value_dim = num_prefix + grid[0] * grid[1], value_dim or dim

    def made(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype or torch.float32)

    if value_dim == dim:
        tensors = list(made(batch, num_tokens, 3, heads, dim).unbind(2))
    else:
        tensors = [made(batch, num_tokens, heads, x) for x in (dim, dim, value_dim)]
    return [*tensors, *(made(batch, num_extra, heads, x) for x in (dim, value_dim))]


def results(inputs, impl="triton", **options) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients of a sum that weighs every number of both."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    query, key, value, *extra = leaves
    named = dict(zip(("extra_key", "extra_value"), extra, strict=True)) if extra[0].numel() else {}
    out = local_attention(query, key, value, **named, **options, return_lse=True, impl=impl)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in out]
    wanted = leaves if named else leaves[:3]
    # In this thread, else a GPU's backward pass would not see what the test has pinned.
    with torch.autograd.set_multithreading_enabled(False):
        return [x.detach() for x in (*out, *torch.autograd.grad(out, wanted, weights))]


def compare(inputs, **options) -> None:
    """err(kernel, float64) <= 2 err(reference in the same dtype, float64) + eps max|float64|.

    In float32 the last term grows by max|lse|: lse is kept for the backward in that precision, and
    its rounding moves all weights by so much.
    """
    got = results(inputs, **options)
    plain = results(inputs, "reference", **options)
    exact = results([x.double() for x in inputs], "reference", **options)
    rounding = torch.finfo(inputs[0].dtype).eps
    if inputs[0].dtype == torch.float32:
        rounding *= 1 + exact[1].abs().max()
    for place, (mine, same, true) in enumerate(zip(got, plain, exact, strict=True)):
        assert mine.dtype == same.dtype
        assert mine.shape == same.shape
        error = (mine.double() - true).abs().max()
        allowed = 2 * (same.double() - true).abs().max()
        allowed += rounding * true.abs().max()
        assert error <= allowed, f"result {place}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("grid", "num_prefix", "num_extra", "radius", "scale"),
    [
        ((5, 7), 5, 3, 3.5, None),
        ((1, 30), 0, 0, 4, -0.3),
        ((11, 2), 17, 0, 1, None),
        ((6, 6), 0, 20, float("inf"), 0.5),
    ],
    ids=str,
)
def test_every_result(grid, num_prefix, num_extra, radius, scale):
    inputs = inputs_of(grid, num_prefix, num_extra, batch=2, heads=1, dim=24, value_dim=16)
    with pinned(**SMALL):
        compare(inputs, grid=grid, radius=radius, num_prefix=num_prefix, scale=scale)


# Without shrinking, which takes minutes in the interpreter.
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    num_prefix=st.integers(0, 4),
    radius=st.floats(1, 9),
)
def test_any_geometry(grid, num_prefix, radius):
    with pinned(**SMALL):
        compare(inputs_of(grid, num_prefix), grid=grid, radius=radius, num_prefix=num_prefix)


@pytest.mark.parametrize(("radius", "count"), [(5**0.5 - 1e-12, 13), (5**0.5 + 1e-12, 21)])
def test_radius_is_compared_in_double_precision(radius, count):
    query, key, value = inputs_of((5, 6))[:3]
    options = {"grid": (5, 6), "radius": radius, "scale": 0.0, "return_lse": True}
    with pinned(**SMALL):
        _, lse = local_attention(query, key, value, **options, impl="triton")
    # With all logits zero, exp(lse) counts the visible keys, of which 8 lie at distance sqrt(5).
    assert lse.exp().max().round() == count


def test_parts_of_the_keys_merge_by_lse():
    grid, options = (4, 6), {"grid": (4, 6), "radius": 2.5, "impl": "triton", "return_lse": True}
    query, key, value, extra_key, extra_value = inputs_of(grid, num_extra=7)
    with pinned(**SMALL):
        whole, whole_lse = local_attention(
            query, key, value, extra_key=extra_key, extra_value=extra_value, **options
        )
        parts = [
            local_attention(query, key, value, **options),
            local_attention(
                query, extra_key[:, :1].expand_as(key), extra_value[:, :1].expand_as(value),
                extra_key=extra_key[:, 1:], extra_value=extra_value[:, 1:],
                **(options | {"radius": 1}),
            ),
        ]  # fmt: skip
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(o * (part - lse).exp()[..., None] for o, part in parts)
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(out, whole)


def test_any_strides_and_the_same_bits_twice():
    inputs = inputs_of((3, 5), 3, 2, heads=2)
    strange = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs]
    options = {"grid": (3, 5), "radius": 2, "num_prefix": 3}
    with pinned(**SMALL):
        first, second = results(inputs, **options), results(strange, **options)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_zero_sizes():
    for shape in ((0, 15, 2, 8), (2, 15, 0, 8)):
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        out = local_attention(x, x, x, grid=(3, 4), radius=2, num_prefix=3, impl="triton")
        out.sum().backward()
        assert out.shape == x.grad.shape == shape


def test_operators_pass_opcheck():
    inputs, numbers = inputs_of((3, 4), 2, 1), (3, 4, 2, 2.0, 0.25)
    operators = torch.ops.lintra
    with pinned(**SMALL):
        torch.library.opcheck(operators.local_attention_fwd.default, (*inputs, *numbers))
        out, lse = operators.local_attention_fwd(*inputs, *numbers)
        arguments = (*inputs, out, lse, out, lse, *numbers)
        torch.library.opcheck(operators.local_attention_bwd.default, arguments)


def test_meta_tensors_have_shapes_only():
    query, value = torch.empty(2, 14, 3, 8, device="meta"), torch.empty(2, 14, 3, 4, device="meta")
    out, lse = local_attention(
        query, query, value, grid=(3, 4), radius=2, num_prefix=2, impl="triton", return_lse=True
    )
    assert (out.shape, lse.shape, out.is_meta) == ((2, 14, 3, 4), (2, 14, 3), True)


def test_compiles_once_for_all_sizes():
    counter = CompileCounterWithBackend("aot_eager")

    def function(query, key, value, image):
        grid = tuple(image.shape)
        num_prefix = query.shape[1] - grid[0] * grid[1]
        return local_attention(
            query, key, value, grid=grid, radius=2.5, num_prefix=num_prefix, impl="triton"
        )

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for grid, num_prefix in (((2, 4), 2), ((3, 5), 3)):
        image, inputs = torch.zeros(grid), inputs_of(grid, num_prefix)[:3]
        leaves = [x.detach().requires_grad_() for x in inputs]
        with pinned(**SMALL):
            pair = [f(*leaves, image) for f in (compiled, function)]
            grads = [torch.autograd.grad(out.square().sum(), leaves) for out in pair]
        torch.testing.assert_close(*pair)
        torch.testing.assert_close(*grads)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_checkpointing_and_autocast_change_nothing():
    leaves = [x.detach().requires_grad_() for x in inputs_of((4, 4), 2)[:3]]

    def function(*tensors):
        return local_attention(*tensors, grid=(4, 4), radius=2, num_prefix=2, impl="triton")

    with pinned(**SMALL):
        plain = function(*leaves)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            again = checkpoint(function, *leaves, use_reentrant=False)
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (plain, again)]
    assert torch.equal(plain, again)
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
def test_no_tangent_is_lost(impl):
    x = torch.randn(1, 12, 1, 16, device=DEVICE)

    def attend(query):
        return local_attention(query, x, x, grid=(3, 4), radius=1.5, impl=impl)

    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(attend, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            attend(dual)


def test_second_derivative_raises():
    query, key, value = inputs_of((3, 3))[:3]
    query = query.detach().requires_grad_()
    with pinned(**SMALL):
        out = local_attention(query, key, value, grid=(3, 3), radius=2, impl="triton")
        (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="`local_attention` must be differentiated only"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((1, 4, 1, 160), (2, 2), "take 1 to 128 channels, got 160 and 160"),
        ((1, 16385, 1, 8), (1, 16385), "take grid sides up to 16384, got 1 x 16385"),
    ],
)
def test_what_the_kernels_cannot_do(shape, grid, message):
    x = torch.zeros(shape, device=DEVICE)
    with pytest.raises(NotImplementedError, match=f"`impl` must not be 'triton' .*{message}"):
        local_attention(x, x, x, grid=grid, radius=2, impl="triton")
    local_attention(x[:, :4, :, :4], x[:, :4, :, :4], x[:, :4, :, :4], grid=(2, 2), radius=2)


def test_unsupported_dtype():
    x = torch.zeros(1, 4, 1, 8, device=DEVICE, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="float16, bfloat16 and float32, got torch.float"):
        local_attention(x, x, x, grid=(2, 2), radius=2, impl="triton")


def test_partial_results_do_not_grow_with_the_keys():
    tensor = torch.empty(1, 1, 1, 1, device=DEVICE)
    for programs in (1, 24, 96, 1000):
        most = configs.parts_of(2**12, 64, programs, tensor)[0]
        assert configs.parts_of(2**20, 64, programs, tensor)[0] <= max(most, 560 // programs)
        parts, share = configs.parts_of(1000, 64, programs, tensor)
        assert (parts - 1) * share < 1000 <= parts * share
        assert configs.even_parts(programs, 2**20, 132) <= 6


def test_heads_take_turns_as_far_as_the_cache_holds_their_rows():
    # The best of those measured on an H100, see docs/performance.md.
    best = {(64, 8): 8, (64, 32): 8, (128, 8): 8, (128, 32): 4, (256, 16): 4, (256, 32): 2}
    for (side, radius), count in best.items():
        assert configs.heads_together(24, side, radius**2, 512) == count
    assert configs.heads_together(3, 64, 64, 512) == 1


@pytest.mark.parametrize("name", case_names("B_pooled"))
def test_clear_mask_with_pooled_keys(name):
    case, stored = load_case(name)
    config, specs = case["config"], case["inputs"]
    q, k, v = (tokens_first(noise_tensor(specs[x])).to(DEVICE).float() for x in ("q", "k", "v"))
    extra = [tokens_first(stored[f"{x}_pooled"]).to(DEVICE).float() for x in ("k", "v")]
    out, lse = local_attention(
        q, k, v,
        grid=(config["height"], config["width"]), radius=config["radius"],
        num_prefix=config["text"], scale=config["scale"],
        extra_key=extra[0], extra_value=extra[1], return_lse=True, impl="triton",
    )  # fmt: skip
    for mine, key in ((out, "out"), (lse, "lse")):
        expected = stored[key].to(DEVICE).float()
        torch.testing.assert_close(tokens_first(mine), expected, rtol=1e-4, atol=1e-5)


_ALL_LOCAL = case_names("B_local")
_QUICK_LOCAL = [name for name in _ALL_LOCAL if "5x9_t7" in name]


@pytest.mark.parametrize(
    "name",
    [
        *_QUICK_LOCAL,
        *(pytest.param(x, marks=pytest.mark.gpu) for x in _ALL_LOCAL if x not in _QUICK_LOCAL),
    ],
)
def test_clear_mask(name):
    case, stored = load_case(name)
    config, specs = case["config"], case["inputs"]
    q, k, v = (tokens_first(noise_tensor(specs[x])).to(DEVICE).float() for x in ("q", "k", "v"))
    for radius in config["radii"]:
        options = {"grid": (config["height"], config["width"]), "radius": radius}
        options |= {"num_prefix": config["text"], "scale": config["scale"]}
        compare([q, k, v, k[:, :0], v[:, :0]], **options)
        out, lse = local_attention(q, k, v, **options, return_lse=True, impl="triton")
        for mine, key in ((out, "out"), (lse, "lse")):
            expected = stored[f"r{radius}.{key}"].to(DEVICE)
            torch.testing.assert_close(tokens_first(mine), expected.float(), rtol=1e-4, atol=1e-5)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GEOMETRIES = [
    ((19, 27), 70, 10, 5.5),
    ((40, 40), 0, 0, 9),
    ((1, 300), 3, 0, 1e9),
    ((8, 8), 0, 0, 1),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 72, 96, 128])
def test_shapes_on_gpu(dim, dtype):
    for grid, num_prefix, num_extra, radius in GEOMETRIES:
        inputs = inputs_of(grid, num_prefix, num_extra, batch=2, heads=3, dim=dim, dtype=dtype)
        compare(inputs, grid=grid, radius=radius, num_prefix=num_prefix)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_general_kernels_on_gpu(dtype):
    for grid, num_prefix, num_extra, radius in GEOMETRIES:
        inputs = inputs_of(grid, num_prefix, num_extra, batch=2, heads=3, dim=128, dtype=dtype)
        with pinned(local_fwd_way="general", local_bwd_way="general", local_prefix_way="general"):
            compare(inputs, grid=grid, radius=radius, num_prefix=num_prefix)


@pytest.mark.gpu
def test_no_recompile_for_a_new_grid_or_radius():
    from lintra.kernels.local_attention import hopper_fwd, triton_fwd

    kernels = [triton_fwd._local_attention_fwd_kernel]
    kernels.append(hopper_fwd._local_attention_fwd_hopper_kernel)
    counts = []
    for grid, num_prefix, radius in (((16, 16), 16, 4), ((9, 33), 37, 5), ((1, 64), 1, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = inputs_of(grid, num_prefix, heads=2, dim=64, dtype=dtype)
            results(inputs, grid=grid, radius=radius, num_prefix=num_prefix)
        counts.append(
            [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
        )
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    side, heads, dim = 512, 24, 128  # 2.4e9 elements of query, key and value
    qkv = torch.zeros(1, side, side, 3, heads, dim, dtype=torch.bfloat16, device="cuda")
    corner = torch.randn(1, 8, 64, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    qkv[:, -8:, -64:] = corner
    leaves = qkv.flatten(1, 2).requires_grad_()
    small = corner.flatten(1, 2).requires_grad_()
    outs = []
    for x, grid in ((leaves, (side, side)), (small, (8, 64))):
        out = local_attention(*x.unbind(2), grid=grid, radius=4, impl="triton")
        (grad,) = torch.autograd.grad(out.float().square().sum(), x)
        # What sees no further than the corner: 3 tokens for the output, 6 for the gradient.
        outs.append([y.detach().unflatten(1, grid)[:, -2:, -57:] for y in (out, grad)])
    for big, one in zip(*outs, strict=True):
        torch.testing.assert_close(big, one)
