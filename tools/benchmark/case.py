"""A case: one operation at one shape, with its peers, its floor and its targets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., Tensor]

OURS = "lintra"
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
# The backward reads what the forward read and wrote, and writes as much: twice the bytes.
FLOOR_FACTOR = {"fwd": 1.0, "bwd": 2.0, "fwd+bwd": 3.0}


@dataclass(frozen=True)
class Peer:
    """Another way to compute a case.

    Args:
        prepare: makes the function that is timed; called once a direction and outside the clock,
            so it may build masks or compile. Whatever it raises is reported in the peer's cell.
        is_compiled: costs seconds of torch.compile; `--no-compile` leaves it out.
        directions: those worth measuring.
    """

    prepare: Callable[[], Run]
    is_compiled: bool = False
    directions: tuple[str, ...] = DIRECTIONS


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Args:
        op: name of the operation.
        group: what the shape is for, e.g. "DeiT".
        shape: label, without commas.
        make: `make(device, dtype)` gives the inputs; those that require a gradient get one.
        run: our implementation, called with the inputs.
        reference: the oracle, called with the inputs in any dtype.
        floor_bytes: what the forward must move, for an element size in bytes.
        flops: of the forward, 0 where they say nothing.
        peers: by name.
        targets: by (direction, peer or "floor"): highest multiple of the floor, or lowest speed-up
            over the peer.
        cut: makes the case smaller for the check, where the oracle could not run it whole.
        directions: those to measure.
    """

    op: str
    group: str
    shape: str
    make: Callable[[torch.device, torch.dtype], list[Tensor]]
    run: Run
    reference: Run
    floor_bytes: Callable[[int], int]
    flops: float = 0.0
    peers: Mapping[str, Peer] = field(default_factory=dict)
    targets: Mapping[tuple[str, str], float] = field(default_factory=dict)
    cut: Callable[[list[Tensor]], list[Tensor]] = lambda inputs: inputs
    directions: tuple[str, ...] = DIRECTIONS


def compiled(function: Run, **options: Any) -> Peer:
    """`function` under torch.compile."""

    def prepare() -> Run:
        # Without it the eighth shape of a process meets the recompile limit and runs eagerly.
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False, **options)

    return Peer(prepare, is_compiled=True)


def eager(function: Run, **options: Any) -> Peer:
    return Peer(lambda: function, **options)
