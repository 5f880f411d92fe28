"""A case: one operation or model at one shape, with its peers, its floor and its targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., Tensor]

OURS = "lintra"
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
# The backward reads what the forward read and wrote, and writes as much: twice the bytes.
# A training step ("step") of a model has no floor.
FLOOR_FACTOR = {"fwd": 1.0, "bwd": 2.0, "fwd+bwd": 3.0, "step": 0.0}
# Softmax attention: two products forward, five backward, which computes the weights again.
ATTENTION_FACTOR = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5, "step": 0.0}
# Dense products of float16 and bfloat16 a second, by a word of the name of the GPU.
PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12}


@dataclass(frozen=True)
class Peer:
    """A way to compute a case.

    Args:
        prepare: makes the function that is timed; called off the clock, so it may build masks or
            compile. It leaves torch.compile's caches alone, in which another may have its code:
            the runner empties them. What it raises is reported in its cells.
        is_compiled: costs seconds of torch.compile; `--no-compile` leaves it out.
    """

    prepare: Callable[[], Run]
    is_compiled: bool = False


@dataclass(frozen=True)
class Case:
    """One operation or model at one shape.

    Args:
        op: name of the operation or model.
        group: what the shape is for, e.g. "DeiT".
        shape: label, without commas.
        make: `make(device, dtype)` gives the inputs; those that require a gradient get one.
        ours: our implementation.
        peers: the others, by name.
        reference: the oracle, called with the inputs in any dtype; None for a model.
        checks: what is checked instead of the case: operations at the shapes of a model.
        cut: makes the inputs smaller for the check, where the oracle could not run them whole.
        floor_bytes: what the forward must move, for an element size in bytes; None: not known.
        flops: of the forward, 0 where they say nothing.
        is_attention: the flops of `ATTENTION_FACTOR`, at the peak of the GPU, are a floor too.
        targets: by (direction, peer or "floor"): highest multiple of the floor, or lowest speed-up
            over the peer; "memory of PEER": highest multiple of the peer's memory.
        directions: those to measure.
        images: of one call, for a model; 0 where nobody counts them.
        takes_turns: ours and the peers are prepared together and timed in turns, launches included,
            see `turns`: for models, which may wait for a host that changes its pace. They should
            fit into the memory together, and have the directions "fwd" or "step" only. Otherwise
            one is timed after the other and launches are queued off the clock.
    """

    op: str
    group: str
    shape: str
    make: Callable[[torch.device, torch.dtype], list[Tensor]]
    ours: Peer
    peers: Mapping[str, Peer] = field(default_factory=dict)
    reference: Run | None = None
    checks: tuple["Case", ...] = ()
    cut: Callable[[list[Tensor]], list[Tensor]] = lambda inputs: inputs
    floor_bytes: Callable[[int], int] | None = None
    flops: float = 0.0
    is_attention: bool = False
    targets: Mapping[tuple[str, str], float] = field(default_factory=dict)
    directions: tuple[str, ...] = DIRECTIONS
    images: int = 0
    takes_turns: bool = False

    def __post_init__(self) -> None:
        assert not self.takes_turns or {"fwd", "step"}.issuperset(self.directions)

    def __str__(self) -> str:
        return " ".join(dict.fromkeys([self.op, self.group, self.shape]))


def compiled(function: Run, **options: Any) -> Peer:
    """`function` under torch.compile."""

    return Peer(lambda: torch.compile(function, dynamic=False, **options), is_compiled=True)


def eager(function: Run) -> Peer:
    return Peer(lambda: function)


def check_shape(shape: Sequence[int], lengths: Sequence[int], layout: str) -> None:
    """A shape from the command line: as many numbers as `layout` names, optional ones 0 or more."""
    least = min(lengths)
    if len(shape) not in lengths or min(shape[:least], default=0) < 1 or min(shape) < 0:
        raise ValueError(f"`shape` must be {layout}, all positive, got {tuple(shape)}")
