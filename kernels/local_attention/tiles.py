"""Tiles of queries on the grid with the rectangles of keys their discs touch, cut by arithmetic.

Legend: B batch, N = T + h * w tokens, T of them prefix, H heads, D channels; C keys that every
image query sees; n tiles at once, with t queries and K window keys each.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, product
from typing import NamedTuple

import torch
from torch import Tensor

from .._common.precision import accumulation_dtype

# Side of a square tile of queries. Larger ones look at more keys outside the discs, smaller ones
# pay more overhead: 8 is within 15 % of the best side on a CPU for radii from 2 to 32.
TILE_SIDE = 8
# Bytes of scores, keys and values alive at once: few on a CPU, for its caches.
CPU_BYTES = 16 * 2**20
ACCELERATOR_BYTES = 256 * 2**20


class Span(NamedTuple):
    """`size` queries along one axis; keys from `before` the first query to `after` the last."""

    size: int
    before: int
    after: int
    start: int

    @property
    def queries(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def keys(self) -> slice:
        return slice(self.start - self.before, self.start + self.size + self.after)

    def squared_offsets(self, device: torch.device) -> Tensor:
        keys = torch.arange(-self.before, self.size + self.after, device=device)
        return (torch.arange(self.size, device=device)[:, None] - keys).square()


Tile = tuple[Span, Span]


def _form(tile: Tile) -> tuple[int, ...]:
    rows, columns = tile
    return rows[:3] + columns[:3]


@dataclass(frozen=True)
class Geometry:
    """Where the tokens lie and how far an image query sees."""

    height: int
    width: int
    num_prefix: int
    radius: float

    def prefix(self, tokens: Tensor) -> Tensor:
        """View (B, N, H, D) -> (B, H, T, D)."""
        return tokens[:, : self.num_prefix].transpose(1, 2)

    def image(self, tokens: Tensor) -> Tensor:
        """View (B, N, H, D) -> (B, H, h, w, D)."""
        image = tokens[:, self.num_prefix :].unflatten(1, (self.height, self.width))
        return image.permute(0, 3, 1, 2, 4)

    def tiles(self) -> list[Tile]:
        """The grid in tiles; those of one form, which share their mask, follow each other."""
        return sorted(product(self._spans(self.height), self._spans(self.width)), key=_form)

    def hidden(self, tile: Tile, device: torch.device) -> Tensor:
        """(t, K), true where the key lies outside the disc of the query."""
        rows, columns = (span.squared_offsets(device) for span in tile)
        distance = rows[:, None, :, None] + columns[None, :, None, :]
        # An integer limit: against a Python float, torch would compare in float32.
        limit = math.ceil(self._clipped_radius**2)
        return (distance >= limit).flatten(2).flatten(0, 1)

    @property
    def _clipped_radius(self) -> float:
        return min(self.radius, self.height + self.width)  # sees all, yet has a finite square

    def _spans(self, length: int) -> list[Span]:
        reach = math.ceil(self._clipped_radius) - 1
        spans = []
        for start in range(0, length, TILE_SIDE):
            size = min(TILE_SIDE, length - start)
            spans.append(Span(size, min(reach, start), min(reach, length - start - size), start))
        return spans


@dataclass(frozen=True)
class Budget:
    """How much fits into memory at once: C common keys, `channels` = D + E per key."""

    geometry: Geometry
    num_common: int
    channels: int
    itemsize: int
    limit: int

    @classmethod
    def of(cls, geometry: Geometry, key: Tensor, value: Tensor, extra_key: Tensor) -> "Budget":
        return cls(
            geometry,
            geometry.num_prefix + extra_key.shape[1],
            key.shape[3] + value.shape[3],
            accumulation_dtype(key.dtype).itemsize,
            CPU_BYTES if key.device.type == "cpu" else ACCELERATOR_BYTES,
        )

    def parts(self, batch: int, num_heads: int) -> Iterator[tuple[slice, slice, slice]]:
        """Cuts (samples, tokens, heads) of the inputs small enough for the widest tile."""
        count = max(1, self.limit // max(map(self._tile_bytes, self.geometry.tiles())))
        samples, heads = max(1, count // max(1, num_heads)), min(count, max(1, num_heads))
        for sample, head in product(range(0, batch, samples), range(0, num_heads, heads)):
            yield slice(sample, sample + samples), slice(None), slice(head, head + heads)

    def tile_groups(self, num_sequences: int) -> Iterator[list[Tile]]:
        """Lists of tiles of one form; `num_sequences` is samples times heads."""
        for _, equal in groupby(self.geometry.tiles(), key=_form):
            tiles = list(equal)
            count = max(1, self.limit // (self._tile_bytes(tiles[0]) * num_sequences))
            for first in range(0, len(tiles), count):
                yield tiles[first : first + count]

    def chunks(self, num_sequences: int) -> Iterator[slice]:
        """Cuts of all tokens, the keys of the prefix queries."""
        geometry = self.geometry
        num_tokens = geometry.num_prefix + geometry.height * geometry.width
        one = 2 * self.itemsize * num_sequences * (geometry.num_prefix + self.channels)
        size = max(1, self.limit // one)
        for first in range(0, num_tokens if geometry.num_prefix else 0, size):
            yield slice(first, first + size)

    def _tile_bytes(self, tile: Tile) -> int:
        """Scores, keys and values of one sample and head, and as much again for gradients."""
        rows, columns = tile
        num_keys = self.num_common + sum(rows[:3]) * sum(columns[:3])
        return 2 * self.itemsize * num_keys * (rows.size * columns.size + self.channels)


def take_queries(image: Tensor, tiles: list[Tile], dtype: torch.dtype) -> Tensor:
    """(B, H, h, w, D) -> (B, H, n, t, D)."""
    parts = [image[:, :, rows.queries, columns.queries] for rows, columns in tiles]
    return torch.stack(parts, 2).flatten(3, 4).to(dtype)


def put_queries(image: Tensor, tiles: list[Tile], values: Tensor) -> None:
    """Inverse of `take_queries`: every query belongs to one tile."""
    for part, (rows, columns) in zip(values.unbind(2), tiles, strict=True):
        image[:, :, rows.queries, columns.queries] = part.unflatten(2, (rows.size, columns.size))


def take_keys(image: Tensor, tiles: list[Tile], dtype: torch.dtype) -> Tensor:
    """(B, H, h, w, D) -> (B, H, n, K, D)."""
    parts = [image[:, :, rows.keys, columns.keys] for rows, columns in tiles]
    return torch.stack(parts, 2).flatten(3, 4).to(dtype)


def add_keys(image: Tensor, tiles: list[Tile], values: Tensor) -> None:
    """Adjoint of `take_keys`: tiles share keys, so their gradients add up."""
    for part, (rows, columns) in zip(values.unbind(2), tiles, strict=True):
        target = image[:, :, rows.keys, columns.keys]
        target += part.unflatten(2, target.shape[2:4])
