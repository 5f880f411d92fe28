"""Stacked linear layers: the layers they stand for, the kernel against them, the contract."""

import pytest
import torch
from torch.nn import functional as F

from kernel_checks import DEVICE, on_gpu_or_interpreted, poisoned
from lintra.kernels import TensorTable, stacked_linear

__all__ = ["poisoned"]
HALVES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
# G, B, K, F, rows of a table (0: none), x shared, silu.
CASES = [
    (1, 1, 16, 8, 0, True, False),
    (3, 5, 64, 72, 11, True, True),
    (2, 33, 200, 130, 4, False, False),
    (4, 2, 24, 64, 0, False, True),
    (2, 70, 32, 16, 3, True, True),
]


def inputs_of(
    groups, batch, width, outputs, rows, shared, silu, dtype=torch.float32, tables=None, each=False
):
    """x, and the options of the operation: tables of tensors that lie apart, of the dtype `tables`
    if it is not that of x; each layer with labels of its own if `each`."""

    def table(*shape, scale=1.0):
        made = [torch.randn(*shape).mul(scale) for _ in range(groups)]
        return TensorTable("made", [x.to(DEVICE, tables or dtype) for x in made])

    x = torch.randn(*(() if shared else (groups,)), batch, width).to(DEVICE, dtype)
    options = {"silu": silu}
    if rows:
        options["rows"] = table(rows, outputs)
        shape = (groups, batch) if each else (batch,)
        options["labels"] = torch.randint(rows, shape, device=DEVICE)
    return x, table(outputs, width, scale=width**-0.5), table(outputs), options


def by_modules(x, weights, biases, options, dtype):
    """Layer by layer in `dtype`, rounding where modules of it, or autocast to it, would."""
    outs = []
    wide = torch.promote_types(dtype, weights.dtype)
    for g, (weight, bias) in enumerate(zip(weights.tensors, biases.tensors, strict=True)):
        out = F.linear((x if x.ndim == 2 else x[g]).to(dtype), weight.to(dtype), bias.to(dtype))
        if "rows" in options:
            labels = options["labels"]
            row = options["rows"].tensors[g].to(wide)[labels if labels.ndim == 1 else labels[g]]
            out = out + row
        outs.append(F.silu(out) if options["silu"] else out)
    return torch.stack(outs)


def assert_close(out, inputs):
    x, weights, biases, options = inputs
    exact = by_modules(x, weights, biases, options, torch.float64)
    plain = by_modules(x, weights, biases, options, x.dtype)
    assert out.dtype == plain.dtype
    assert out.shape == exact.shape
    allowed = 2 * (plain.double() - exact).abs().max()
    allowed = allowed + 2 * torch.finfo(x.dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference(case, dtype):
    inputs = inputs_of(*case, dtype)
    *tensors, options = inputs
    assert_close(stacked_linear(*tensors, **options, impl="reference"), inputs)


@on_gpu_or_interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_kernel(case, dtype):
    inputs = inputs_of(*case, dtype)
    *tensors, options = inputs
    assert_close(stacked_linear(*tensors, **options, impl="triton"), inputs)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=on_gpu_or_interpreted)])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_wide_weights_and_labels_of_each_layer(case, dtype, impl):
    """As under autocast, and as blocks draw them that drop labels."""
    inputs = inputs_of(*case, dtype, tables=torch.float32, each=True)
    *tensors, options = inputs
    assert_close(stacked_linear(*tensors, **options, impl=impl), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("tables", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 8, 32, 64, 100])
@pytest.mark.parametrize("sizes", [(256, 1152), (1152, 6912), (384, 2304)], ids=str)
def test_sizes_of_lit(batch, sizes, tables):
    inputs = inputs_of(28, batch, *sizes, 1001, False, True, torch.bfloat16, tables)
    *tensors, options = inputs
    assert_close(stacked_linear(*tensors, **options, impl="triton"), inputs)
    assert_close(stacked_linear(*tensors, **options), inputs)  # launched directly


@on_gpu_or_interpreted
def test_a_strange_label_is_seen():
    x, weights, biases, options = inputs_of(2, 3, 16, 16, 4, True, False)
    options["labels"] = torch.tensor([0, 4, -1], device=DEVICE)
    out = stacked_linear(x, weights, biases, **options, impl="triton")
    assert out[:, 1:].isnan().all()
    assert out[:, 0].isfinite().all()


@on_gpu_or_interpreted
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_samples(shape):
    _, weights, biases, _ = inputs_of(2, 1, 16, 8, 0, True, False)
    out = stacked_linear(torch.zeros(shape, device=DEVICE), weights, biases, impl="triton")
    assert out.shape == (2, 0, 8)


def leaves_of(x, weights, biases, options):
    rows = options["rows"].tensors if "rows" in options else ()
    return [x, *weights.tensors, *biases.tensors, *rows]


def gradients(out, leaves, retain_graph=None):
    torch.manual_seed(1)
    weight = torch.randn(out.shape, dtype=torch.float64).to(out.device, out.dtype)
    return torch.autograd.grad(out, leaves, weight, retain_graph)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=on_gpu_or_interpreted)])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tables"),
    [
        (torch.float32, torch.float32),
        *((half, wide) for half in HALVES for wide in (half, torch.float32)),
    ],
    ids=str,
)
def test_gradients(case, dtype, tables, impl):
    inputs = inputs_of(*case, dtype, tables=tables, each=case[0] == 2)
    leaves = leaves_of(*inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    *tensors, options = inputs
    found = gradients(stacked_linear(*tensors, **options, impl=impl), leaves)
    exact = gradients(by_modules(*inputs, torch.float64), leaves)
    plain = gradients(by_modules(*inputs, dtype), leaves)
    for leaf, ours, theirs, best in zip(leaves, found, plain, exact, strict=True):
        assert ours.dtype == leaf.dtype
        error, size = (theirs.double() - best).abs().max(), best.abs().max()
        assert (ours.double() - best).abs().max() <= 2 * error + 4 * torch.finfo(dtype).eps * size


@on_gpu_or_interpreted
def test_gradients_of_some():
    """Frozen tensors get none, a label that is none takes no row, and gradients add up."""
    x, weights, biases, options = inputs_of(2, 3, 16, 8, 4, True, False)
    options["labels"] = torch.tensor([[0, 4, 1], [-1, 3, 3]], device=DEVICE)
    some = [weights.tensors[1], biases.tensors[0], options["rows"].tensors[1]]
    for tensor in some:
        tensor.requires_grad_()
    for _ in range(2):
        stacked_linear(x, weights, biases, **options, impl="triton").backward(
            torch.ones(2, 3, 8, device=DEVICE)
        )
    assert weights.tensors[0].grad is biases.tensors[1].grad is None
    torch.testing.assert_close(some[0].grad, 2 * x.sum(0).expand(8, 16))
    assert some[1].grad.eq(6).all()
    counts = torch.tensor([0, 0, 0, 4], device=DEVICE)
    assert torch.equal(some[2].grad, counts[:, None].expand(4, 8).float())


def leaves_that_learn(x, weights, biases, options):
    for tensor in (*weights.tensors, *biases.tensors, *options["rows"].tensors):
        tensor.requires_grad_()
    return weights.tensors, biases.tensors, options["rows"].tensors


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=on_gpu_or_interpreted)])
def test_layers_without_a_part_in_the_loss_learn_nothing(impl):
    """Through two operations: None, not zeros, which optimisers would take for gradients."""
    x, weights, biases, options = inputs_of(3, 2, 16, 16, 4, True, True, each=True)
    tables = leaves_that_learn(x, weights, biases, options)
    hidden = stacked_linear(x, weights, biases, **options, separate=True, impl=impl)
    outs = stacked_linear(hidden, weights, biases, separate=True, impl=impl)
    assert [out.shape for out in outs] == [(2, 16)] * 3
    outs[2].sum().backward()
    for tensors in tables:
        assert [tensor.grad is None for tensor in tensors] == [True, True, False]
        grad = tensors[2].grad
        assert grad.untyped_storage().nbytes() == grad.nbytes  # nothing else is kept with it
    found = [tensors[2].grad for tensors in tables]
    alone = [TensorTable("one", tensors[2:]) for tensors in tables]
    for tensors in tables:
        tensors[2].grad = None
    hidden = stacked_linear(
        x, *alone[:2], rows=alone[2], labels=options["labels"][2:], silu=True, impl="reference"
    )
    stacked_linear(hidden, *alone[:2], impl="reference").sum().backward()
    for grad, tensors in zip(found, tables, strict=True):
        torch.testing.assert_close(grad, tensors[2].grad, rtol=1e-4, atol=1e-5)


@on_gpu_or_interpreted
def test_a_backward_pass_under_autocast_keeps_its_precision():
    x, weights, biases, _ = inputs_of(2, 3, 64, 8, 0, False, True)
    leaves = [x, *weights.tensors]
    for leaf in leaves:
        leaf.requires_grad_()
    out = stacked_linear(x, weights, biases, silu=True, impl="triton")
    plain = gradients(out, leaves, retain_graph=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        lowered = gradients(out, leaves)
    assert all(map(torch.equal, plain, lowered))


@on_gpu_or_interpreted
def test_what_no_gradient_needs_may_change():
    x, weights, biases, _ = inputs_of(2, 3, 16, 8, 0, True, True)
    biases.tensors[0].requires_grad_()
    out = stacked_linear(x, weights, biases, silu=True, impl="triton")
    x.zero_()
    weights.tensors[0].zero_()
    out.sum().backward()
    weights.tensors[0].requires_grad_()
    out = stacked_linear(x, weights, biases, silu=True, impl="triton")
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@on_gpu_or_interpreted
def test_no_copy_of_gradients():
    """Those of a table's tensors lie in one, and are not copied once more to become `grad`."""
    x, weights, biases, _ = inputs_of(3, 4, 16, 8, 0, True, False)
    for tensor in weights.tensors:
        tensor.requires_grad_()
    stacked_linear(x, weights, biases, impl="triton").sum().backward()
    first, *others = (tensor.grad for tensor in weights.tensors)
    assert all(
        other.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for other in others
    )


@on_gpu_or_interpreted
@pytest.mark.parametrize("place", [0, 1, 2])
def test_only_once_differentiable(place):
    x, weights, biases, _ = inputs_of(2, 3, 16, 8, 0, True, True)
    leaf = (x, weights.tensors[0], biases.tensors[0])[place].requires_grad_()
    out = stacked_linear(x, weights, biases, silu=True, impl="triton")
    (gradient,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated only once"):
        gradient.sum().backward()


def test_meta():
    x, weights, biases, _ = inputs_of(2, 3, 16, 8, 0, True, False)
    tables = [TensorTable("meta", [y.to("meta") for y in t.tensors]) for t in (weights, biases)]
    assert stacked_linear(x.to("meta"), *tables).shape == (2, 3, 8)


def test_integers_are_refused():
    x, weights, biases, _ = inputs_of(2, 3, 16, 8, 0, True, False)
    with pytest.raises(TypeError, match="`x` must be float16"):
        stacked_linear(x.int(), weights, biases)


def test_moved_tensors_are_refused():
    x, weights, biases, _ = inputs_of(2, 3, 16, 8, 0, True, False)
    weights.tensors[0].data = weights.tensors[0].data.clone()
    assert weights.has_moved()
    with pytest.raises(ValueError, match="must be made anew once tensors have moved"):
        stacked_linear(x, weights, biases)


@pytest.mark.gpu
def test_a_graph_keeps_the_addresses():
    x, weights, biases, _ = inputs_of(3, 4, 64, 64, 0, True, False, torch.bfloat16)
    keep = weights.tensors, biases.tensors
    expected = stacked_linear(x, weights, biases)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stacked_linear(x, weights, biases)
    del weights, biases
    torch.cuda.empty_cache()
    junk = [torch.full((3,), -1, device=DEVICE) for _ in range(64)]
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    del keep, junk


def test_addresses_are_not_sent_into_a_graph(monkeypatch):
    table = TensorTable("weights", [torch.zeros(2)])
    table.device = torch.device("cuda")  # as if it were there
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="used once before a CUDA graph"):
        table.addresses()


def test_a_table_knows_its_tensors():
    tensors = [torch.zeros(2, 4) for _ in range(3)]
    table = TensorTable("weights", tensors)
    assert table.is_current(tensors)
    assert table.is_plain
    assert table.addresses().tolist() == [x.data_ptr() for x in tensors]
    moved = tensors[1].data
    tensors[1].data = torch.zeros(2, 4)
    assert not table.is_current(tensors)
    tensors[1].data = moved
    assert table.is_current(tensors)
    assert not table.is_current([*tensors[:2], tensors[2].clone()])
    assert not table.is_current(tensors[:2])
    assert not table.is_current([*tensors[:2], None])
    assert not TensorTable("weights", [torch.zeros(4, 2).t()]).is_plain
    assert not TensorTable("weights", [torch.zeros(9)[1:]]).is_plain


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([], ValueError, "`weights` must hold at least one tensor, got none"),
        ([torch.zeros(2), torch.zeros(3)], ValueError, "one shape and device"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], ValueError, "one shape and device"),
        ([torch.zeros(2), torch.zeros(2).half()], TypeError, "one dtype"),
    ],
)
def test_bad_tables(tensors, error, message):
    with pytest.raises(error, match=message):
        TensorTable("weights", tensors)


def _changed(**changes):
    x, weights, biases, options = inputs_of(2, 3, 16, 8, 5, True, False)
    made = {"x": x, "weights": weights, "biases": biases, **options}
    return {**made, **{name: change(made) for name, change in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": lambda _: torch.zeros(3, 8, device=DEVICE)},
            ValueError,
            r"`x` must have shape \(B, 16\)",
        ),
        ({"x": lambda _: torch.zeros(3, 3, 16, device=DEVICE)}, ValueError, "`x` must have shape"),
        (
            {"x": lambda _: torch.zeros(3, 16, device=DEVICE).double()},
            TypeError,
            "`x` must have dtype",
        ),
        ({"biases": lambda m: m["weights"]}, ValueError, "`biases` must be 2 of shape"),
        (
            {"biases": lambda _: TensorTable("b", [torch.zeros(8, device=DEVICE).half()] * 2)},
            TypeError,
            "`biases` must have dtype",
        ),
        ({"labels": lambda _: None}, ValueError, "must be given together"),
        (
            {"labels": lambda _: torch.zeros(3, device=DEVICE)},
            ValueError,
            "`labels` must be 3 of int64",
        ),
        (
            {"labels": lambda _: torch.zeros(4, device=DEVICE).long()},
            ValueError,
            "`labels` must be 3 of int64",
        ),
        (
            {"labels": lambda _: torch.zeros(3, 3, device=DEVICE).long()},
            ValueError,
            "`labels` must be 3 of int64, or 2 times as many",
        ),
        ({"labels": lambda m: m["labels"].to("meta")}, ValueError, "`labels` must be on"),
        ({"x": lambda m: [m["x"]] * 3}, ValueError, "`x` must be 2 tensors of one shape"),
        ({"x": lambda m: [m["x"], m["x"][:1]]}, ValueError, "`x` must be 2 tensors of one shape"),
        ({"x": lambda m: [m["x"][None]] * 2}, ValueError, "`x` must have shape"),
        ({"dtype": lambda _: torch.float64}, TypeError, "`dtype` must be torch.float32, or half"),
        ({"x": lambda m: m["x"].to("meta")}, ValueError, "`x` must be on"),
        (
            {"biases": lambda _: TensorTable("b", [torch.zeros(8, device="meta")] * 2)},
            ValueError,
            "`biases` must be on",
        ),
        ({"impl": lambda _: "cuda"}, ValueError, "`impl` must be one of"),
        ({"weights": lambda m: m["biases"]}, ValueError, r"`weights` must have shape \(F, K\)"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        stacked_linear(**_changed(**changes))
