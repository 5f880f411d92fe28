"""Launch plans are made once for each layout, and never remembered while settings are pinned."""

import pytest
import torch
from torch import Tensor

from kernel_checks import DEVICE, on_gpu_or_interpreted
from lintra.kernels import (
    ada_layer_norm,
    gated_ada_layer_norm,
    gated_add,
    layer_norm,
    linear_attention,
    local_attention,
    token_conv2d,
)
from lintra.kernels._common import plans as module
from lintra.kernels._common.pinning import pin_or, pinned
from lintra.kernels._common.plans import Memo, Plans


@pytest.fixture
def made() -> list[tuple[object, ...]]:
    return []


@pytest.fixture
def plans(made: list[tuple[object, ...]]) -> Plans[tuple[object, ...]]:
    def make(tensors: tuple[Tensor | None, ...], *options: object) -> tuple[object, ...]:
        plan = (*(None if x is None else x.stride() for x in tensors), *options, pin_or("block", 1))
        made.append(plan)
        return plan

    return Plans(make)


def test_a_layout_is_planned_once(plans: Plans, made: list) -> None:
    first = plans((torch.rand(2, 3), None), "relu", 1.0)
    assert first == ((3, 1), None, "relu", 1.0, 1)
    assert plans((torch.rand(2, 3), None), "relu", 1.0) is first
    assert len(made) == 1


@pytest.mark.parametrize(
    "other",
    [
        (torch.rand(3, 2).t(), "relu"),
        (torch.rand(4, 3), "relu"),
        (torch.rand(2, 3).half(), "relu"),
        (torch.rand(2, 3), "elu1"),
        (torch.rand(2, 3, device="meta"), "relu"),
        (None, "relu"),
    ],
)
def test_what_makes_another_plan(plans: Plans, made: list, other: tuple) -> None:
    plans((torch.rand(2, 3),), "relu")
    plans((other[0],), other[1])
    assert len(made) == 2


def test_pinned_settings_are_not_remembered(plans: Plans) -> None:
    x = torch.rand(2, 3)
    assert plans((x,))[-1] == 1
    with pinned(block=7):
        assert plans((x,))[-1] == 7
    assert plans((x,))[-1] == 1


def test_many_layouts_do_not_pile_up(
    plans: Plans, made: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LIMIT", 2)
    for size in (1, 2, 3):
        plans((torch.rand(size),))
    assert len(plans._known) == 1
    plans((torch.rand(3),))
    assert len(made) == 3


def test_errors_are_raised_every_time() -> None:
    def make(tensors: tuple[Tensor, ...]) -> None:
        made.append(tensors)
        raise ValueError("`x` must be another, got this")

    made: list[object] = []
    plans = Plans(make)
    for _ in range(2):
        with pytest.raises(ValueError, match="`x` must be another"):
            plans((torch.rand(2),))
    assert len(made) == 2


def test_none_is_a_plan() -> None:
    made: list[object] = []
    plans = Plans(made.append)
    for _ in range(2):
        assert plans((torch.rand(2),)) is None
    assert len(made) == 1


@pytest.mark.parametrize("arguments", [((1.0,),), ((torch.rand(2),), [7, 7])])
def test_what_has_no_layout_is_made_each_time(arguments: tuple) -> None:
    made: list[object] = []
    plans = Plans(lambda *parts: made.append(parts))
    for _ in range(2):
        plans(*arguments)
    assert len(made) == 2


def test_a_memo_keeps_the_plan(plans: Plans, made: list) -> None:
    memo, x = Memo(), torch.rand(2, 3)
    first = plans((x,), memo=memo)
    plans._known.clear()
    assert plans((x,), memo=memo) is first
    assert plans((x,), memo=Memo()) == first
    assert len(made) == 2


@on_gpu_or_interpreted
def test_every_option_of_an_operation_has_its_memo() -> None:
    q, k, v = torch.rand(3, 1, 6, 1, 16, device=DEVICE).unbind()
    weight, bias = torch.rand(16, 3, 3, device=DEVICE), torch.rand(16, device=DEVICE)

    def norm(eps: float, impl: str) -> Tensor:
        return layer_norm(q, bias, bias, eps=eps, impl=impl)

    def adapt(eps: float, impl: str) -> Tensor:
        tokens = q.flatten(2)
        return ada_layer_norm(tokens, tokens[:, 0], tokens[:, 1], eps=eps, impl=impl)

    def gate(eps: float, impl: str) -> Tensor:
        tokens, also = q.flatten(2), v.flatten(2)
        gated = (also[:, 1], tokens[:, 0], tokens[:, 1])
        return torch.stack(gated_ada_layer_norm(tokens, also, *gated, eps=eps, impl=impl))

    def add(eps: float, impl: str) -> Tensor:
        tokens = q.flatten(2) if eps < 1 else q[:, :4].flatten(2)
        return gated_add(tokens, tokens, tokens[:, 1], impl=impl)

    def attend(eps: float, impl: str) -> Tensor:
        return linear_attention(q, k, v, scale=eps, eps=eps, impl=impl)

    def convolve(eps: float, impl: str) -> Tensor:
        grid = (2, 3) if eps < 1 else (3, 2)
        return token_conv2d(v.flatten(2), weight, grid=grid, impl=impl)

    def attend_locally(eps: float, impl: str) -> Tensor:
        grid = (2, 2) if eps < 1 else (1, 4)
        options = {"grid": grid, "radius": 1 + eps, "num_prefix": 2, "scale": eps, "impl": impl}
        return torch.cat(
            [x.flatten() for x in local_attention(q, k, v, **options, return_lse=True)]
        )

    for operation in (norm, adapt, gate, add, attend, convolve, attend_locally):
        for eps in (0.5, 2.0, 0.5):
            expected = operation(eps, "reference")
            torch.testing.assert_close(operation(eps, "triton"), expected)
    with pinned(unknown=1):
        torch.testing.assert_close(norm(0.5, "triton"), norm(0.5, "reference"))


def test_compilers_see_no_memory() -> None:
    plans = Plans(lambda tensors: tensors[0].shape[0])
    double = torch.compile(lambda x: x * plans((x,)), backend="eager", fullgraph=True)
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert not plans._known
