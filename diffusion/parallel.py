"""Exact local and linear attention over several devices, each with some rows of the image.

Rank p of P holds the rows ``row_split(h, P)[p]`` of the grid and a copy of the text. What a rank
computes with the text counts as the same on all of them, gradients included, as in tensor
parallelism: a loss on text tokens is taken whole on every rank, one on image tokens in parts.

CLEAR, Liu et al. 2024 (arXiv:2412.16112), sends the keys of rows near a border to the neighbours
and *averages* what text queries find in each part. Here the parts are merged by their log-sum-exp,
which costs one more number a query and equals attention on one device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lintra.kernels import linear_attention, local_attention, token_conv2d

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


class _AllReduce(torch.autograd.Function):
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


def _shard_of(
    grid: tuple[int, int], num_tokens: int, split: Sequence[Rows] | None, group: Group
) -> RowShard:
    whole = row_split(grid[0], dist.get_world_size(group)) if split is None else tuple(split)
    shard = RowShard(whole, group)
    rows = shard.rows
    if len(rows) * grid[1] != num_tokens:
        raise ValueError(
            f"`query` must hold rows {rows.start} .. {rows.stop - 1} of the {grid[0]} x {grid[1]}"
            f" grid on this rank, {len(rows) * grid[1]} image tokens, got {num_tokens}"
        )
    return shard


def _with_borders(
    tokens: Tensor, shard: RowShard, width: int, halo: int
) -> tuple[Tensor, int, int]:
    """Own tokens between those of the rows above and below, and the rows above and in all."""
    strip = tokens.unflatten(1, (-1, width))
    above, below = _BorderRows.apply(strip, shard.split, halo, shard.group)
    whole = torch.cat([above, strip, below], dim=1)
    return whole.flatten(1, 2), above.shape[1], whole.shape[1]


def parallel_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    radius: float,
    num_prefix: int = 0,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    split: Sequence[Rows] | None = None,
    group: Group = None,
) -> Tensor:
    """`local_attention` of a grid whose rows lie on several ranks, exactly, gradients included.

    Image queries get the keys and values of ``ceil(radius) - 1`` rows on each side; text queries
    merge what each rank's rows hold, by ``L = logsumexp_p L_p``, ``o = sum_p exp(L_p - L) o_p``,
    with the text keys counted on rank 0 alone. Sends 2 (ceil(radius) - 1) w rows of keys and
    values, and T H (E + 1) sums.

    Args:
        query: ``(B, T + rows * w, H, D)``, the text and the rows of this rank, see `row_split`.
        key: as `query`.
        value: ``(B, T + rows * w, H, E)``.
        grid: ``(h, w)`` of the whole image, in tokens.
        radius, scale: see `local_attention`.
        num_prefix: T; the text must be the same on all ranks.
        extra_key: ``(B, M, H, D)``, **all** extra keys on every rank, e.g. of `gather_tokens`.
        extra_value: ``(B, M, H, E)``.
        split: rows of each rank; None is `row_split` of the grid.
        group: process group; None is the default one.

    Returns:
        ``(B, T + rows * w, H, E)``, the text equal on all ranks.

    Raises:
        ValueError: fewer rows than ranks, tokens that are not the rows of this rank, a rank with
            one image token only; what `local_attention` refuses.
    """
    num_image = query.shape[1] - num_prefix
    shard = _shard_of(grid, num_image, split, group)
    if num_prefix and num_image < 2:
        raise ValueError(f"`query` must hold at least 2 image tokens on a rank, got {num_image}")
    halo = min(math.ceil(radius) - 1, grid[0])
    # Text is used by every rank in its own way, so its gradients are summed.
    text = [_AllReduce.apply(x[:, :num_prefix], group, False, True) for x in (query, key, value)]
    image = [x[:, num_prefix:] for x in (query, key, value)]
    keys, above, num_rows = _with_borders(image[1], shard, grid[1], halo)
    values, _, _ = _with_borders(image[2], shard, grid[1], halo)
    # The operation wants a query for each key: those of other ranks' rows are not looked at.
    start = above * grid[1]
    queries = image[0].new_zeros(*keys.shape[:3], image[0].shape[3])
    queries = torch.cat(
        [queries[:, :start], image[0], queries[:, start + num_image :]],
        dim=1,
    )
    common = [
        torch.cat([t, e], dim=1) if e is not None else t
        for t, e in zip(text[1:], (extra_key, extra_value), strict=True)
    ]
    out = local_attention(
        queries,
        keys,
        values,
        grid=(num_rows, grid[1]),
        radius=radius,
        scale=scale,
        extra_key=common[0] if common[0].shape[1] else None,
        extra_value=common[1] if common[1].shape[1] else None,
    )
    assert isinstance(out, Tensor)
    out = out[:, start : start + num_image]
    if not num_prefix:
        return out
    counts_text = dist.get_rank(group) == 0
    seen = [torch.cat([t, i], 1) if counts_text else i for t, i in zip(text, image, strict=True)]
    text_out = _merge(*_attend_fully(text[0], seen[1], seen[2], scale), group)
    return torch.cat([text_out.to(out.dtype), out], dim=1)


def _attend_fully(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax over all keys and its log-sum-exp: what a prefix query of `local_attention` gets.

    The operation wants as many queries as keys: the others are zeros and see nothing but a disc of
    one token and the first keys.
    """
    parts = []
    # Prefix queries must be fewer than keys.
    for part in query.split(key.shape[1] - 1, dim=1):
        count = part.shape[1]
        rest = part.new_zeros(part.shape[0], key.shape[1] - count, *part.shape[2:])
        out, lse = local_attention(
            torch.cat([part, rest], dim=1),
            key,
            value,
            grid=(1, rest.shape[1]),
            radius=1,
            num_prefix=count,
            scale=scale,
            return_lse=True,
        )
        parts.append((out[:, :count], lse[:, :count]))
    out, lse = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    return out, lse


def _merge(out: Tensor, lse: Tensor, group: Group) -> Tensor:
    top = lse.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    weight = (lse - top).exp().unsqueeze(-1)
    sums = torch.cat([out.to(weight.dtype) * weight, weight], dim=-1)
    sums = _AllReduce.apply(sums, group, True, False)
    return sums[..., :-1] / sums[..., -1:]


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
    return _AllReduce.apply(placed, group, True, True)


def parallel_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "relu",
    scale: float = 1.0,
    eps: float = 1e-6,
    group: Group = None,
) -> Tensor:
    """`linear_attention` with normaliser ``ratio`` over tokens that lie on several ranks.

    Only the state ``S = sum_j phi(k_j) v_j^T`` and ``z = sum_j phi(k_j)`` is summed: H D (E + 1)
    numbers, float32 whatever the inputs, and as many again in the backward, for any number of
    tokens.

    Args:
        query: ``(B, M, H, D)``, the tokens of this rank, in any split.
        key: ``(B, N, H, D)``.
        value: ``(B, N, H, E)``.
        feature_map: ``relu`` or ``identity``, which leave the unit vectors as they are.
        scale, eps: see `linear_attention`.
        group: process group; None is the default one.

    Returns:
        ``(B, M, H, E)``.

    Raises:
        ValueError: another feature map; what `linear_attention` refuses.
    """
    if feature_map not in ("relu", "identity"):
        raise ValueError(f"`feature_map` must be relu or identity, got {feature_map!r}")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, _, heads, dim = query.shape
    unit = torch.eye(dim, device=query.device, dtype=dtype)[None, :, None]
    unit = unit.expand(batch, dim, heads, dim)
    # A column of ones brings z along with S. Unit vectors as queries read the state out, and as
    # keys with its rows as values they put it back.
    columns = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1).to(dtype)
    sums = {"feature_map": feature_map, "normalizer": "none", "scale": 1.0}
    state = linear_attention(unit, key.to(dtype), columns, **sums)  # type: ignore[arg-type]
    state = _AllReduce.apply(state, group, True, True)
    out = linear_attention(query.to(dtype), unit, state, **sums)  # type: ignore[arg-type]
    out = scale * out[..., :-1] / (scale * out[..., -1:] + eps)
    return out.to(query.dtype)


def parallel_token_conv2d(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    residual: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """`token_conv2d` of a grid whose rows lie on several ranks; LiT's values need 2 rows a side.

    Args:
        tokens: ``(B, rows * w, C)``, the rows of this rank, see `row_split`.
        weight: ``(C, k, k)`` or ``(B, C, k, k)``; its gradient, and that of `bias`, is this rank's
            part.
        bias: ``(C)``.
        grid: ``(h, w)`` of the whole image, in tokens.
        residual: as `tokens`.
        group: process group; None is the default one.

    Raises:
        ValueError: fewer rows than ranks, tokens that are not the rows of this rank; what
            `token_conv2d` refuses.
    """
    shard = _shard_of(grid, tokens.shape[1], None, group)
    whole, above, num_rows = _with_borders(tokens, shard, grid[1], weight.shape[-1] // 2)
    out = token_conv2d(whole, weight, bias, grid=(num_rows, grid[1]))
    out = out[:, above * grid[1] : above * grid[1] + tokens.shape[1]]
    return out if residual is None else out + residual
