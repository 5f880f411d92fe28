"""An operator leaves the dispatcher out only where nobody would notice."""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_checks import DEVICE, on_gpu_or_interpreted
from lintra.kernels import linear_attention
from lintra.kernels._common import operators
from lintra.kernels._common.operators import Operator, unless_transformed
from lintra.kernels._common.plans import Memo


class Subclass(Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class Names(TorchDispatchMode):
    """As FlopCounterMode: sees every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **kwargs or {})


@pytest.fixture
def operator() -> Operator:
    """Returns the way a call goes."""
    made = Operator("linear_attention_fwd", lambda: lambda *_: "launcher")
    made._registered = lambda *_: "dispatcher"
    return made


def test_plain_tensors_go_to_the_launcher(operator):
    x = torch.ones(3)
    assert operator(x, None, "relu", 1, 1.0, True) == "launcher"
    assert operator(torch.nn.Parameter(x, requires_grad=False)) == "launcher"
    with torch.no_grad():
        assert operator(torch.nn.Parameter(x)) == "launcher"
    with torch.inference_mode():
        assert operator(x, torch.ones(3)) == "launcher"
    with torch.autocast("cpu"):
        assert operator(x) == "launcher"


def test_a_memo_goes_to_the_launcher_alone():
    made = Operator("linear_attention_fwd", lambda: lambda *_, memo=None: memo)
    made._registered = lambda *arguments: arguments
    x, memo = torch.ones(3), Memo()
    assert made(x, memo=memo) is memo
    assert made(x.requires_grad_(), memo=memo) == (x,)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.requires_grad_(),
        lambda x: x.as_subclass(Subclass),
        lambda x: torch._neg_view(x),
        lambda x: torch._efficientzerotensor(3),
        lambda x: torch._to_functional_tensor(x),
        lambda x: x.to("meta"),
    ],
)
def test_other_tensors_go_to_the_dispatcher(operator, make):
    other = make(torch.ones(3))
    assert operator(torch.ones(3), 1, other) == "dispatcher"


def test_numbers_of_another_kind_go_to_the_dispatcher(operator):
    assert operator(torch.ones(3), [1, 2]) == "dispatcher"


def test_a_torch_that_does_not_say_dispatches_all(operator, monkeypatch):
    monkeypatch.setattr(operators, "_ANSWERED", False)
    assert operator(torch.ones(3)) == "dispatcher"


@pytest.mark.parametrize("mode", [Functions, Names, torch.profiler.profile])
def test_modes_see_the_operator(operator, mode):
    with mode():
        assert operator(torch.ones(3)) == "dispatcher"
    assert operator(torch.ones(3)) == "launcher"


def test_transforms_take_the_reference():
    """Where a kernel would lose a tangent, or be unknown."""
    seen = []

    def record(x: Tensor) -> Tensor:
        seen.append(unless_transformed(True, "auto", "thing"))
        with pytest.raises(NotImplementedError, match="'triton' for thing: .* torch.func"):
            unless_transformed(True, "triton", "thing")
        assert not unless_transformed(False, "triton", "thing")
        return x.sum()

    torch.func.grad(record)(torch.ones(3))
    torch.func.vmap(record)(torch.ones(2, 3))
    torch.func.jvp(record, (torch.ones(3),), (torch.ones(3),))
    with torch.autograd.forward_ad.dual_level():
        record(torch.ones(3))
    assert seen == [False] * 4
    assert unless_transformed(True, "triton", "thing")


def test_tangents_arrive():
    """On a GPU too, where `auto` takes no kernel then."""
    x = torch.randn(2, 5, 3, 4, device=DEVICE)
    _, tangent = torch.func.jvp(lambda q: linear_attention(q, x, x), (x,), (torch.ones_like(x),))
    assert tangent.abs().max() > 0


def test_transforms_see_the_operator(operator):
    seen = []

    def record(x: Tensor) -> Tensor:
        seen.append(operator(x))
        return x.sum()

    torch.func.vmap(record)(torch.ones(2, 3))
    torch.func.grad(record)(torch.ones(3))
    torch.jit.trace(record, torch.ones(3), check_trace=False)
    torch.compile(record, backend="eager", fullgraph=True)(torch.ones(3))
    with torch._subclasses.FakeTensorMode():
        seen.append(operator(torch.ones(3)))
    assert seen == ["dispatcher"] * 5


@on_gpu_or_interpreted
def test_both_ways_of_an_operation_are_equal():
    q, k, v = torch.randn(3, 1, 8, 2, 16, device=DEVICE).unbind()
    plain = linear_attention(q, k, v, impl="triton")
    with Names() as seen:
        assert torch.equal(linear_attention(q, k, v, impl="triton"), plain)
    assert "lintra::linear_attention_fwd" in seen.names
    negative = torch._neg_view(v)
    assert torch.equal(linear_attention(q, k, negative, impl="triton"), -plain)
