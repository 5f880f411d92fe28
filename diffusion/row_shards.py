"""The rows of a token grid on several devices: who has which, and what they send each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
Rows = range


def row_split(height: int, num_ranks: int, multiple: int = 1) -> tuple[Rows, ...]:
    """Rows of the grid for each rank: in order, multiples of `multiple`, as equal as can be.

    Raises:
        ValueError: fewer such rows than ranks, or rows that `multiple` does not divide.
    """
    if height % multiple:
        raise ValueError(f"`height` must be a multiple of {multiple}, got {height}")
    blocks = height // multiple
    if not 1 <= num_ranks <= blocks:
        raise ValueError(
            f"`num_ranks` must be in 1 .. {blocks} for {height} rows in groups of {multiple}, got"
            f" {num_ranks}"
        )
    starts = [blocks * rank // num_ranks * multiple for rank in range(num_ranks + 1)]
    return tuple(range(first, last) for first, last in pairwise(starts))


@dataclass(frozen=True)
class RowShard:
    """Which rows of a grid are whose.

    Args:
        split: rows of each rank, see `row_split`.
        group: their process group; None is the default one.
    """

    split: tuple[Rows, ...]
    group: Group = None

    @property
    def rows(self) -> Rows:
        """Those of this rank."""
        return self.split[dist.get_rank(self.group)]


class AllReduce(torch.autograd.Function):
    """The sum over ranks, forward, backward or both.

    Forward only where every rank goes on with the same sum and so has its whole gradient; backward
    only where every rank goes its own way from the same tensor; both for a sum that is used in
    different ways.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, on_forward: bool, on_backward: bool) -> Tensor:
        ctx.group, ctx.on_backward = group, on_backward
        return _sum(x, group) if on_forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum(grad, ctx.group) if ctx.on_backward else grad, None, None, None


def _sum(x: Tensor, group: Group) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _overlap(a: Rows, b: Rows) -> Rows:
    return range(max(a.start, b.start), min(a.stop, b.stop))


class _BorderRows(torch.autograd.Function):
    """Rows of other ranks above and below one's own; backward returns their gradients.

    `strip` is (B, rows, w, ...). More than the neighbours take part where strips are thin.
    """

    @staticmethod
    def forward(
        ctx: Any, strip: Tensor, split: Sequence[Rows], halo: int, group: Group
    ) -> tuple[Tensor, Tensor]:
        rank = dist.get_rank(group)
        wanted = [_halos(rows, halo, split[-1].stop) for rows in split]
        # For each other rank and each side: the rows that it wants of mine, and I of its.
        send = [(p, _overlap(w, split[rank])) for p, ws in enumerate(wanted) for w in ws]
        receive = [(p, _overlap(w, split[p])) for w in wanted[rank] for p in range(len(split))]
        ctx.plan, ctx.group, ctx.own = (send, receive), group, split[rank]
        ctx.sides = wanted[rank]
        sides = [strip.new_empty(_shape(strip, len(rows))) for rows in wanted[rank]]
        outgoing = [
            (p, _rows(strip, rows, split[rank].start).contiguous()) for p, rows in send if rows
        ]
        incoming = [
            (p, strip.new_empty(_shape(strip, len(rows))), rows) for p, rows in receive if rows
        ]
        _exchange(outgoing, [(p, x) for p, x, _ in incoming], group)
        for _, x, rows in incoming:
            side, place = _side_of(rows, ctx.sides, sides)
            side[:, rows.start - place : rows.stop - place] = x
        return sides[0], sides[1]

    @staticmethod
    def backward(ctx: Any, above: Tensor, below: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.plan
        grads = [above, below]
        outgoing = []
        for p, rows in receive:
            if rows:
                side, place = _side_of(rows, ctx.sides, grads)
                outgoing.append((p, _rows(side, rows, place).contiguous()))
        incoming = [
            (p, above.new_empty(_shape(above, len(rows))), rows) for p, rows in send if rows
        ]
        _exchange(outgoing, [(p, x) for p, x, _ in incoming], ctx.group)
        grad = above.new_zeros(_shape(above, len(ctx.own)))
        for _, x, rows in incoming:
            _rows(grad, rows, ctx.own.start).add_(x)
        return grad, None, None, None


def _halos(rows: Rows, halo: int, height: int) -> tuple[Rows, Rows]:
    above = range(max(rows.start - halo, 0), rows.start)
    return above, range(rows.stop, min(rows.stop + halo, height))


def _shape(like: Tensor, num_rows: int) -> tuple[int, ...]:
    return (like.shape[0], num_rows, *like.shape[2:])


def _rows(x: Tensor, rows: Rows, first: int) -> Tensor:
    return x[:, rows.start - first : rows.stop - first]


def _side_of(rows: Rows, sides: Sequence[Rows], values: Sequence[Tensor]) -> tuple[Tensor, int]:
    index = 0 if rows.start in sides[0] else 1
    return values[index], sides[index].start


def _exchange(
    outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]], group: Group
) -> None:
    def peer(rank: int) -> int:
        return rank if group is None else dist.get_global_rank(group, rank)

    work = [dist.P2POp(dist.isend, x, peer(rank), group) for rank, x in outgoing]
    work += [dist.P2POp(dist.irecv, x, peer(rank), group) for rank, x in incoming]
    for request in dist.batch_isend_irecv(work) if work else ():
        request.wait()


def with_borders(tokens: Tensor, shard: RowShard, width: int, halo: int) -> tuple[Tensor, int, int]:
    """Own tokens between those of the rows above and below, and the rows above and in all."""
    strip = tokens.unflatten(1, (-1, width))
    above, below = _BorderRows.apply(strip, shard.split, halo, shard.group)
    whole = torch.cat([above, strip, below], dim=1)
    return whole.flatten(1, 2), above.shape[1], whole.shape[1]


def gather_tokens(tokens: Tensor, counts: Sequence[int], group: Group = None) -> Tensor:
    """Tokens ``(B, counts[p], ...)`` of each rank p as ``(B, sum(counts), ...)`` on all of them.

    For the pooled keys of CLEAR: a rank whose rows the down factor divides pools its own.

    Raises:
        ValueError: `tokens` are not as many as `counts` says for this rank.
    """
    rank = dist.get_rank(group)
    if tokens.shape[1] != counts[rank]:
        raise ValueError(f"`tokens` must be {counts[rank]} on this rank, got {tokens.shape[1]}")
    before, after = sum(counts[:rank]), sum(counts[rank + 1 :])
    placed = torch.cat(
        [
            tokens.new_zeros(tokens.shape[0], before, *tokens.shape[2:]),
            tokens,
            tokens.new_zeros(tokens.shape[0], after, *tokens.shape[2:]),
        ],
        dim=1,
    )
    return AllReduce.apply(placed, group, True, True)
