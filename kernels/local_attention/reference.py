"""Local attention in plain PyTorch, tile by tile: runs on every device, serves as the oracle.

CLEAR (Liu et al. 2024, arXiv:2412.16112). Legend: B batch, N = T + h * w tokens, T of them prefix,
M extra keys, H heads, D and E channels of key and value; C = T + M keys that every image query
sees. Tensors with full names are (B, N, H, D); q, k, v, o, lse of a tile, and their gradients
dq, ..., are (B, H, [n tiles,] tokens, D), lse being (..., 1).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .tiles import Budget, Geometry, Tile, add_keys, put_queries, take_keys, take_queries

Inputs = Sequence[Tensor]  # query, key, value, extra key, extra value; or their gradients


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    scores = q @ k.mT
    if hidden is not None:  # speaks of the last keys only, those of the window
        scores[..., -hidden.shape[-1] :].masked_fill_(hidden, -math.inf)
    return scores


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, hidden)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    return (weights @ v).div_(total), total.log_().add_(top)


def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, results: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """dV = P^T dO, dS = P * (dO V^T - delta), dQ = dS K, dK = dS^T Q with P = exp(S - lse).

    delta = rowsum(dO * O) - dlse holds all that softmax needs to know of the other keys, since
    d lse / dS = P. So the keys may come in any number of pieces.
    """
    o, lse, do, dlse = results
    delta = (do * o).sum(-1, keepdim=True).sub_(dlse)
    weights = _scores(q, k, hidden).sub_(lse).exp_()
    dv = weights.mT @ do
    dscores = weights.mul_((do @ v.mT).sub_(delta))
    return dscores @ k, dscores.mT @ q, dv


def _image_blocks(
    geometry: Geometry, scale: float, inputs: Inputs, dtype: torch.dtype
) -> Iterator[tuple[list[Tile], Tensor, Tensor, Tensor, Tensor]]:
    """Tiles of image queries with q, k, v and the mask of the window, after the C common keys."""
    query, key, value, extra_key, extra_value = inputs
    budget = Budget.of(geometry, key, value, extra_key)
    common = [
        torch.cat([geometry.prefix(tokens), extra.transpose(1, 2)], 2).to(dtype).unsqueeze(2)
        for tokens, extra in ((key, extra_key), (value, extra_value))
    ]  # (B, H, 1, C, D)
    images = [geometry.image(tokens) for tokens in (key, value)]
    for tiles in budget.tile_groups(query.shape[0] * query.shape[2]):
        q = take_queries(geometry.image(query), tiles, dtype).mul_(scale)
        k, v = (
            torch.cat([every.expand(-1, -1, len(tiles), -1, -1), take_keys(image, tiles, dtype)], 3)
            for every, image in zip(common, images, strict=True)
        )
        yield tiles, q, k, v, geometry.hidden(tiles[0], query.device)


def _prefix_blocks(
    geometry: Geometry, inputs: Inputs, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Pieces of the keys and values of all tokens, which are what a prefix query sees."""
    query, key, value, extra_key, _ = inputs
    budget = Budget.of(geometry, key, value, extra_key)
    for chunk in budget.chunks(query.shape[0] * query.shape[2]):
        k, v = (tokens[:, chunk].transpose(1, 2).to(dtype) for tokens in (key, value))
        yield chunk, k, v


def forward(geometry: Geometry, scale: float, inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    """Fill `out` (B, N, H, E) and `lse` (B, N, H, 1)."""
    for tiles, q, k, v, hidden in _image_blocks(geometry, scale, inputs, lse.dtype):
        o_tile, lse_tile = _attend(q, k, v, hidden)
        put_queries(geometry.image(out), tiles, o_tile)
        put_queries(geometry.image(lse), tiles, lse_tile)

    q = geometry.prefix(inputs[0]).to(lse.dtype) * scale
    o_sum = q.new_zeros(*q.shape[:3], out.shape[3])
    lse_sum = q.new_full((*q.shape[:3], 1), -math.inf)
    for _, k, v in _prefix_blocks(geometry, inputs, lse.dtype):
        o_part, lse_part = _attend(q, k, v, None)
        merged = torch.logaddexp(lse_sum, lse_part)
        o_sum = o_sum * (lse_sum - merged).exp_() + o_part * (lse_part - merged).exp_()
        lse_sum = merged
    geometry.prefix(out).copy_(o_sum)
    geometry.prefix(lse).copy_(lse_sum)


def backward(
    geometry: Geometry, scale: float, inputs: Inputs, results: list[Tensor], grads: Inputs
) -> None:
    """Fill or add to `grads`, those of `inputs`; `results` are out, lse and their gradients."""
    grad_query, grad_key, grad_value, grad_extra_key, grad_extra_value = grads
    dtype, num_prefix = grad_key.dtype, geometry.num_prefix
    num_common = num_prefix + grad_extra_key.shape[1]
    for tiles, q, k, v, hidden in _image_blocks(geometry, scale, inputs, dtype):
        result_tiles = [take_queries(geometry.image(x), tiles, dtype) for x in results]
        dq, dk, dv = _attend_backward(q, k, v, hidden, result_tiles)
        put_queries(geometry.image(grad_query), tiles, dq.mul_(scale))
        for grad, grad_extra, d in (
            (grad_key, grad_extra_key, dk),
            (grad_value, grad_extra_value, dv),
        ):
            add_keys(geometry.image(grad), tiles, d[:, :, :, num_common:])
            common = d[:, :, :, :num_common].sum(2).transpose(1, 2)  # (B, C, H, D)
            grad[:, :num_prefix] += common[:, :num_prefix]
            grad_extra += common[:, num_prefix:]

    q = geometry.prefix(inputs[0]).to(dtype) * scale
    prefix_results = [geometry.prefix(x).to(dtype) for x in results]
    grad_q = torch.zeros_like(q)
    for chunk, k, v in _prefix_blocks(geometry, inputs, dtype):
        dq, dk, dv = _attend_backward(q, k, v, None, prefix_results)
        grad_q += dq
        grad_key[:, chunk] += dk.transpose(1, 2)
        grad_value[:, chunk] += dv.transpose(1, 2)
    geometry.prefix(grad_query).copy_(grad_q.mul_(scale))


def parts(
    geometry: Geometry, inputs: Inputs, others: list[Tensor]
) -> Iterator[tuple[Inputs, list[Tensor]]]:
    """Views of all tensors, a few samples and heads at a time."""
    query, key, value, extra_key, _ = inputs
    budget = Budget.of(geometry, key, value, extra_key)
    for cut in budget.parts(query.shape[0], query.shape[2]):
        yield [x[cut] for x in inputs], [x[cut] for x in others]
