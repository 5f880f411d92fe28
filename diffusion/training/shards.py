"""Rows of tensors that lie in several safetensors files, and the index beside them."""

import bisect
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "index.json"


def read_index(folder: Path, keys: Sequence[str], version: int, what: str) -> dict[str, Any]:
    """The index of a cache.

    Args:
        folder: the cache.
        keys: what the index must hold.
        version: the `format_version` that this code reads.
        what: kind of the cache, for the messages.
    Raises:
        ValueError: no index, no JSON, missing keys or another version.
    """
    file = folder / INDEX_NAME
    if not file.is_file():
        raise ValueError(f"`folder` must be a {what} cache with an {INDEX_NAME}, got {folder}")
    try:
        index = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} must be valid JSON, got {error}") from error
    missing = [key for key in keys if not isinstance(index, dict) or key not in index]
    if missing:
        raise ValueError(f"{file} must hold {', '.join(keys)}, missing {missing}")
    if index["format_version"] != version:
        raise ValueError(
            f"{file} must have format version {version}, got {index['format_version']}"
        )
    return index


def open_shard(file: Path, what: str) -> Any:
    """An open safetensors file; ValueError if it is missing or not whole."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise ValueError(f"{what} cache must hold the shard {file}, got none") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{what} shard {file} must be whole safetensors, got {error}") from error


class Shards:
    """The rows of shards, numbered through, read one at a time.

    Files are opened when first read; a copy in a worker process opens its own.

    Args:
        folder: where the shards lie.
        shards: `file` and `count` of each, in order.
        what: kind of the cache, for the messages.
    """

    def __init__(self, folder: Path, shards: Sequence[Mapping[str, Any]], what: str):
        self.files = [folder / shard["file"] for shard in shards]
        self.counts = [shard["count"] for shard in shards]
        self._what = what
        self._ends = list(accumulate(self.counts))
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be sent to a worker process.
        return {**self.__dict__, "_open": {}}

    def handle(self, shard: int) -> Any:
        """The open file of one shard."""
        if shard not in self._open:
            self._open[shard] = open_shard(self.files[shard], self._what)
        return self._open[shard]

    def check(self, shard: int, expected: Mapping[str, list[int]]) -> None:
        """Raises ValueError unless a shard holds exactly these tensors, with these shapes."""
        handle = self.handle(shard)
        found = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
        if found != expected:
            raise ValueError(
                f"{self._what} shard {self.files[shard]} must hold {expected}, got {found}"
            )

    def locate(self, index: int) -> tuple[int, int]:
        """Shard of a row, and its number there; negative indices count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be below {len(self)}, got {index}")
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def row(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The named tensors of one row, in their stored dtypes."""
        shard, row = self.locate(index)
        handle = self.handle(shard)
        return {name: handle.get_slice(name)[row] for name in names}
