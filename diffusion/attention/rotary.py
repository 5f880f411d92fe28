"""Norms and rotary positions of FLUX's queries and keys with the fewest passes over memory."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from lintra.kernels import rotary_rms_norm

from ..untouched import is_untouched, on_gpu

# diffusers' form everywhere else: other devices lack parts of complex arithmetic.
_COMPLEX_DEVICES = ("cpu", "cuda")
# Query and key (B, N, H, D), and the norm of each over the channels of a head, None for none.
Part = tuple[Tensor, Tensor, Any, Any]


def normalize_and_rotate(
    parts: Sequence[Part], tables: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Queries and keys of all parts, one after the other, after their norms, rotated by `tables`.

    On a GPU norm and rotation are one pass.

    Args:
        parts: text and image tokens of a joint layer, or all tokens.
        tables: cosines and sines ``(N, D)`` of the tokens of all parts, each twice in a row; None
            for no rotation.

    Returns:
        ``(B, N, H, D)`` each, in the dtype that they have or, in several passes, their norms give
        (float32 under autocast).
    """
    if tables is not None and all(_fuses(*part) for part in parts):
        cosines, sines = (table.to(parts[0][0].device, torch.float32) for table in tables)
        own_tables = [(cosines, sines)]
        if len(parts) > 1:
            counts = [query.shape[1] for query, *_ in parts]
            own_tables = list(zip(cosines.split(counts), sines.split(counts), strict=True))
        turned = [
            rotary_rms_norm(
                query, key, norm_query.weight, norm_key.weight, *own, eps=norm_query.eps
            )
            for (query, key, norm_query, norm_key), own in zip(parts, own_tables, strict=True)
        ]
        return _joined(turned)
    normed = [
        (
            query if norm_query is None else norm_query(query),
            key if norm_key is None else norm_key(key),
        )
        for query, key, norm_query, norm_key in parts
    ]
    query, key = _joined(normed)
    return (query, key) if tables is None else rotate(query, key, tables)


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    query, key = (torch.cat(tensors, dim=1) for tensors in zip(*pairs, strict=True))
    return query, key


def _fuses(query: Tensor, key: Tensor, norm_query: Any, norm_key: Any) -> bool:
    """Whether `rotary_rms_norm` has a kernel for this."""
    if not on_gpu(query) or torch.compiler.is_compiling():
        return False
    if not (is_untouched(norm_query, nn.RMSNorm) and is_untouched(norm_key, nn.RMSNorm)):
        return False
    if norm_query.eps is None or norm_query.eps != norm_key.eps:
        return False
    return norm_query.weight.ndim == norm_key.weight.ndim == 1  # not over heads and channels


def rotate(query: Tensor, key: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotates pairs of channels: ``x_2i + 1j x_2i+1`` times ``cos_2i + 1j sin_2i``.

    Equal to `apply_rotary_emb` of diffusers up to the rounding of float32, in which both compute,
    but as one complex product: 3 kernels a tensor instead of 8, and 16 bytes moved a number in half
    precision instead of about 40. Under torch.compile, which fuses diffusers' form and leaves
    complex numbers to PyTorch, that form is used.

    Args:
        query: ``(B, N, H, D)``, any floating dtype.
        key: ``(B, N, H, D)``.
        tables: cosines and sines ``(N, D)``, each twice in a row.

    Returns:
        Both in the dtypes they had.
    """
    if torch.compiler.is_compiling() or query.device.type not in _COMPLEX_DEVICES:
        rotated = [apply_rotary_emb(x, tables, sequence_dim=1) for x in (query, key)]
        return rotated[0], rotated[1]
    cosines, sines = (table[:, ::2].to(query.device, torch.float32) for table in tables)
    turn = torch.complex(cosines, sines)[:, None]  # (N, 1, D / 2)
    query, key = (_multiply(x, turn) for x in (query, key))
    return query, key


def _multiply(tokens: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(tokens.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(tokens.dtype)
