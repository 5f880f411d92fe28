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

import torch
import torch.distributed as dist
from torch import Tensor

from lintra.kernels import linear_attention, local_attention, token_conv2d

from .row_shards import AllReduce, Group, Rows, RowShard, row_split, with_borders


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
    text = [AllReduce.apply(x[:, :num_prefix], group, False, True) for x in (query, key, value)]
    image = [x[:, num_prefix:] for x in (query, key, value)]
    keys, above, num_rows = with_borders(image[1], shard, grid[1], halo)
    values, _, _ = with_borders(image[2], shard, grid[1], halo)
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
    sums = AllReduce.apply(sums, group, True, False)
    return sums[..., :-1] / sums[..., -1:]


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
    state = AllReduce.apply(state, group, True, True)
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
    whole, above, num_rows = with_borders(tokens, shard, grid[1], weight.shape[-1] // 2)
    out = token_conv2d(whole, weight, bias, grid=(num_rows, grid[1]))
    out = out[:, above * grid[1] : above * grid[1] + tokens.shape[1]]
    return out if residual is None else out + residual
