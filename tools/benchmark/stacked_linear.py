"""Cases of the linear layers that make the conditions of LiT's blocks, against layer by layer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lintra.kernels import TensorTable, stacked_linear

from .case import Case, check_shape, compiled, eager

LAYOUT = "G,B,K,F"
# LiT-XL's 28 blocks, at the batches of 256 and 2048 px: of the time embedding, and the modulation.
SHAPES = [(28, 32, 1152, 1152), (28, 32, 1152, 6912), (28, 1, 1152, 1152), (28, 1, 1152, 6912)]
TINY = [(2, 3, 16, 24), (3, 5, 40, 8)]
_TARGETS = {("fwd", "floor"): 1.5, ("fwd", "eager"): 2.0}


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """x, weights, biases."""
    count, batch, width, outputs = shape
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    weights = [torch.randn(outputs, width, **options) / width**0.5 for _ in range(count)]
    biases = [torch.randn(outputs, **options) for _ in range(count)]
    return [torch.randn(count, batch, width, **options), *weights, *biases]


class _Stacked:
    """Makes the tables of a set of inputs once, as a model does."""

    def __init__(self, impl: str) -> None:
        self._impl = impl
        self._tables: list[tuple[TensorTable, TensorTable]] = []

    def __call__(self, x: Tensor, *rest: Tensor) -> Tensor:
        weights, biases = rest[: len(x)], rest[len(x) :]
        for table in self._tables:
            if table[0].is_current(weights):
                break
        else:
            table = TensorTable("weights", weights), TensorTable("biases", biases)
            self._tables.append(table)
        out = stacked_linear(x, *table, impl=self._impl)
        assert isinstance(out, Tensor)  # not `separate`
        return out


def _layer_by_layer(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    layers = zip(x.unbind(), rest[: len(x)], rest[len(x) :], strict=True)
    return tuple(F.linear(y, weight, bias) for y, weight, bias in layers)


def build(shape: Sequence[int], group: str = "custom", with_targets: bool = False) -> Case:
    """The case of (G, B, K, F). The backward is timed with a model's step."""
    check_shape(shape, (4,), LAYOUT)
    count, batch, width, outputs = shape
    numbers = count * (outputs * (width + 1) + batch * (width + outputs))
    return Case(
        op="stacked_linear",
        group=group,
        shape="x".join(map(str, shape)),
        make=partial(_inputs, shape),
        directions=("fwd",),
        ours=eager(_Stacked("auto")),
        reference=_Stacked("reference"),
        floor_bytes=lambda size: numbers * size,
        flops=2.0 * count * batch * width * outputs,
        peers={
            "eager": eager(_layer_by_layer),  # type: ignore[arg-type]
            "compiled": compiled(_layer_by_layer),  # type: ignore[arg-type]
        },
        targets=_TARGETS if with_targets else {},
    )


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [build(shape) for shape in TINY]
    return [build(shape, "LiT-XL", True) for shape in SHAPES]
