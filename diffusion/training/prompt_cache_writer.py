"""Writing a `PromptCache`, one shard at a time, going on where an interrupted run stopped."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .buckets import Size
from .latent_cache import weights_fingerprint
from .prompt_cache import EMPTY_NAME, FORMAT_VERSION, PromptCache
from .shards import INDEX_NAME
from .text_pipelines import vae_reduction

_PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Encoders:
    """What makes latents of images and embeddings of prompts.

    `pipeline_encoders` takes them from a pipeline; a study may bring its own, such as a table of
    class embeddings for `encode`.

    Attributes:
        family: `flux`, `sd3` or `pixart`, whose embeddings `encode` gives.
        vae: an AutoencoderKL in float32, or a `PixelAutoencoder`.
        encode: prompts -> embeddings with a row each, by the names of `EMBEDDINGS`, on the CPU; it
            must take the empty prompt too.
        origin: where they come from, for people to read.
        text_encoders: name -> fingerprint; training with a teacher compares them with its own.
        max_sequence_length: tokens of a prompt.
    """

    family: str
    vae: ModelMixin
    encode: Callable[[list[str]], dict[str, Tensor]]
    origin: str
    text_encoders: Mapping[str, str]
    max_sequence_length: int

    @property
    def multiple(self) -> int:
        """What heights and widths in pixels must be multiples of: patches are two latents wide."""
        return 2 * vae_reduction(self.vae)


@dataclass(frozen=True)
class Item:
    """One row to write: `number` counts within the source."""

    number: int
    name: str
    caption: str
    bucket: int


# Rows of one bucket and their embeddings -> `mean` (B, V, c, h, w), and `std` for images.
MakeLatents = Callable[[Sequence[Item], Size, dict[str, Tensor]], dict[str, Tensor]]


class CacheWriter:
    """The plan of a cache and the folder in which it grows.

    Args:
        encoders: of images and prompts.
        folder: where the cache will be; must not exist yet, or be empty.
        buckets: sizes of the images.
        items_per_shard: rows in one file.

    Attributes:
        empty: embeddings of the empty prompt, once `write` has begun.

    Raises:
        ValueError: a folder in use, sizes that the VAE and patches do not divide, a number of
            items or tokens below 1.
    """

    def __init__(
        self,
        encoders: Encoders,
        folder: str | Path,
        buckets: Sequence[Size],
        items_per_shard: int,
    ):
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"`folder` must not exist yet or be empty, got {folder}")
        multiple = encoders.multiple
        for height, width in buckets:
            if height % multiple or width % multiple:
                raise ValueError(
                    f"`buckets` must have sides that are multiples of {multiple} for this model,"
                    f" got {height} x {width}"
                )
        for name, value in (
            ("items_per_shard", items_per_shard),
            ("max_sequence_length", encoders.max_sequence_length),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.encoders = encoders
        self.folder = folder
        self.partial = folder.parent / f".{folder.name}.partial"
        self.buckets = list(buckets)
        self.items_per_shard = items_per_shard
        self.empty: dict[str, Tensor] = {}

    def _origin(self) -> dict[str, Any]:
        encoders, vae = self.encoders, self.encoders.vae
        return {
            "format_version": FORMAT_VERSION,
            "family": encoders.family,
            "vae_id": encoders.origin,
            "vae_fingerprint": weights_fingerprint(vae),
            "vae_reduction": vae_reduction(vae),
            "scaling_factor": vae.config.scaling_factor,
            "shift_factor": getattr(vae.config, "shift_factor", None),
            "text_encoders": dict(encoders.text_encoders),
            "max_sequence_length": encoders.max_sequence_length,
            "buckets": [list(size) for size in self.buckets],
        }

    def write(
        self,
        items: Sequence[Item],
        make: MakeLatents,
        batch_size: int,
        *,
        source: dict[str, Any],
        num_views: int,
        latents: Sequence[str],
    ) -> PromptCache:
        """Writes what is not yet there, and gives the folder its name.

        Args:
            items: all rows, in the order of the source.
            make: gives the latents of rows.
            batch_size: rows made at once.
            source: what the index says of it; must have a `kind`.
            num_views: V of the latents.
            latents: names of the tensors that `make` gives.

        Raises:
            ValueError: a folder begun by another call, or values that are not finite.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
        described = self._origin() | {
            "source": source,
            "num_views": num_views,
            "latents": list(latents),
        }
        shards = self._plan(items)
        self._open_partial(described, items)
        self.empty = self._make_empty()
        done = 0
        with tqdm(total=len(items), desc=self.folder.name, unit="img", disable=None) as bar:
            for number, rows in enumerate(shards):
                file = self.partial / _shard_name(number)
                if not _is_whole(file, len(rows)):
                    self._write(file, rows, make, batch_size)
                done += len(rows)
                bar.update(done - bar.n)
        found = PromptCache.shapes(self.partial / _shard_name(0))
        index = {
            **described,
            "latent_channels": found[latents[0]][2],
            "count": len(items),
            "embeddings": {name: list(value.shape) for name, value in self.empty.items()},
            "shards": [
                {"file": _shard_name(number), "count": len(rows), "bucket": rows[0].bucket}
                for number, rows in enumerate(shards)
            ],
        }
        (self.partial / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
        PromptCache(self.partial)  # checked before it gets its name
        (self.partial / _PLAN_NAME).unlink()
        if self.folder.exists():
            self.folder.rmdir()
        self.partial.rename(self.folder)
        return PromptCache(self.folder)

    def _plan(self, items: Sequence[Item]) -> list[list[Item]]:
        """Rows of each shard, one bucket after the other."""
        shards = []
        for bucket in range(len(self.buckets)):
            rows = [item for item in items if item.bucket == bucket]
            size = self.items_per_shard
            shards += [rows[start : start + size] for start in range(0, len(rows), size)]
        return shards

    def _open_partial(self, described: dict[str, Any], items: Sequence[Item]) -> None:
        """Makes the partial folder, or checks that the one there is of this very call."""
        digest = hashlib.sha256(repr(items).encode()).hexdigest()[:16]
        plan = {**described, "items": digest, "items_per_shard": self.items_per_shard}
        file = self.partial / _PLAN_NAME
        if not file.is_file():
            self.partial.mkdir(parents=True, exist_ok=True)
            _write_whole(file, lambda path: path.write_text(json.dumps(plan, indent=1)))
            return
        found = json.loads(file.read_text())
        if differing := sorted(key for key in plan if found.get(key) != plan[key]):
            raise ValueError(
                f"`folder` must be made by the call that began it, got other {', '.join(differing)}"
                f"; remove {self.partial} to begin anew"
            )

    def _make_empty(self) -> dict[str, Tensor]:
        file = self.partial / EMPTY_NAME
        if not file.is_file():
            rows = self.encoders.encode([""])
            empty = {name: value[0].contiguous() for name, value in rows.items()}
            _check_finite(empty, "text encoders")
            _write_whole(file, lambda path: save_file(empty, path))
        return load_file(file)

    def _write(self, file: Path, rows: list[Item], make: MakeLatents, batch_size: int) -> None:
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            captions = [item.caption for item in batch]
            embeddings = self.encoders.encode(captions)
            with torch.no_grad():
                latents = make(batch, self.buckets[rows[0].bucket], embeddings)
            _check_finite(latents, "VAE" if len(latents) > 1 else "transformer")
            _check_finite(embeddings, "text encoders")
            for name, value in (latents | embeddings).items():
                parts.setdefault(name, []).append(value)
        tensors = {name: torch.cat(values).contiguous() for name, values in parts.items()}
        metadata = {
            "names": json.dumps([item.name for item in rows]),
            "captions": json.dumps([item.caption for item in rows]),
        }
        _write_whole(file, lambda path: save_file(tensors, path, metadata))


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside `file` and renames, so that what bears the name is whole."""
    partial = file.with_name(f"{file.name}.partial")
    write(partial)
    os.replace(partial, file)


def _is_whole(file: Path, count: int) -> bool:
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as handle:
            return handle.get_slice("mean").get_shape()[0] == count
    except (SafetensorError, OSError):
        return False


def _check_finite(tensors: dict[str, Tensor], what: str) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"`pipeline` must give finite {name}, got others from its {what}")
