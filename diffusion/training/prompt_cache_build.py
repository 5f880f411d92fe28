"""Writing a `PromptCache`, one shard at a time, going on where an interrupted run stopped."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .buckets import Size, fit_to_bucket, nearest_bucket
from .captions import CaptionedImage
from .latent_cache import scaled_posterior, weights_fingerprint
from .prompt_cache import EMPTY_NAME, FORMAT_VERSION, LATENTS, PromptCache
from .shards import INDEX_NAME
from .text_pipelines import (
    draw_latents,
    encode_prompts,
    encoder_fingerprints,
    size_multiple,
    text_family,
    vae_reduction,
)

_PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class _Item:
    """One row to write: `number` counts within the source."""

    number: int
    name: str
    caption: str
    bucket: int


# Rows of one bucket and their embeddings -> `mean` (B, V, c, h, w), and `std` for images.
_MakeLatents = Callable[[Sequence[_Item], Size, dict[str, Tensor]], dict[str, Tensor]]


def build_prompt_cache(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    images: Sequence[CaptionedImage],
    *,
    pipeline_folder: str | Path,
    buckets: Sequence[Size],
    random_flip: bool = False,
    max_sequence_length: int,
    batch_size: int = 8,
    items_per_shard: int = 256,
) -> PromptCache:
    """Encodes captioned images and their captions once, for training.

    Every finished shard is kept: after an interruption, the same call goes on with the next. The
    folder appears under its name only when it is complete; until then it is a hidden ``.partial``
    folder beside it.

    Args:
        pipeline: from `open_encoders`, on the device that shall work.
        folder: where the cache will be; must not exist yet, or be empty.
        images: from `read_captions`; each goes to the bucket of the nearest shape.
        pipeline_folder: where the pipeline came from; its text encoders are fingerprinted.
        buckets: from `parse_buckets`.
        random_flip: stores the mirrored images as well.
        max_sequence_length: tokens of a prompt.
        batch_size: images encoded at once.
        items_per_shard: images in one file.

    Raises:
        ValueError: a folder in use, or of another call; buckets that do not fit the model; an
            image that cannot be read; latents or embeddings that are not finite.
    """
    items = [
        _Item(number, image.name, image.caption, nearest_bucket(image.size(), buckets))
        for number, image in enumerate(images)
    ]

    def encode(batch: Sequence[_Item], size: Size, _: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = torch.stack([fit_to_bucket(images[i.number].read(), size) for i in batch])
        vae = pipeline.vae
        values = pixels.to(vae.device, vae.dtype) / 127.5 - 1
        views = [values, values.flip(-1)] if random_flip else [values]
        posteriors = [scaled_posterior(vae, view) for view in views]
        parts = zip(*posteriors, strict=True)
        return {
            name: torch.stack(part, dim=1).cpu() for name, part in zip(LATENTS, parts, strict=True)
        }

    source = {"kind": "images", "random_flip": random_flip}
    builder = _Builder(pipeline, Path(folder), buckets, max_sequence_length, items_per_shard)
    builder.describe(pipeline_folder, source, num_views=2 if random_flip else 1, latents=LATENTS)
    return builder.build(items, encode, batch_size)


def build_teacher_cache(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    prompts: Sequence[str],
    *,
    pipeline_folder: str | Path,
    buckets: Sequence[Size],
    max_sequence_length: int,
    num_inference_steps: int = 28,
    guidance_scale: float = 3.5,
    seed: int = 0,
    batch_size: int = 1,
    items_per_shard: int = 256,
) -> PromptCache:
    """A cache of latents that the pipeline itself draws: CLEAR's training data.

    Prompt i is drawn with seed ``seed + i`` in bucket ``i mod len(buckets)``. Other arguments, the
    way of resuming and errors are those of `build_prompt_cache`.

    Args:
        prompts: from `read_prompts`.
        num_inference_steps, guidance_scale: of the pipeline.
    """
    items = [
        _Item(number, f"{number:08d}", prompt, number % len(buckets))
        for number, prompt in enumerate(prompts)
    ]
    source = {
        "kind": "teacher",
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    builder = _Builder(pipeline, Path(folder), buckets, max_sequence_length, items_per_shard)
    builder.describe(pipeline_folder, source, num_views=1, latents=LATENTS[:1])

    def draw(batch: Sequence[_Item], size: Size, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = draw_latents(
            pipeline,
            rows,
            {name: value[None] for name, value in builder.empty.items()},
            size,
            seeds=[seed + item.number for item in batch],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        return {"mean": latents[:, None]}

    return builder.build(items, draw, batch_size)


class _Builder:
    """The plan of a cache and the folder in which it grows."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        folder: Path,
        buckets: Sequence[Size],
        max_sequence_length: int,
        items_per_shard: int,
    ):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"`folder` must not exist yet or be empty, got {folder}")
        multiple = size_multiple(pipeline)
        for height, width in buckets:
            if height % multiple or width % multiple:
                raise ValueError(
                    f"`buckets` must have sides that are multiples of {multiple} for this model,"
                    f" got {height} x {width}"
                )
        for name, value in (
            ("items_per_shard", items_per_shard),
            ("max_sequence_length", max_sequence_length),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.pipeline = pipeline
        self.folder = folder
        self.partial = folder.parent / f".{folder.name}.partial"
        self.buckets = list(buckets)
        self.max_sequence_length = max_sequence_length
        self.items_per_shard = items_per_shard
        self.empty: dict[str, Tensor] = {}

    def describe(
        self, origin: str | Path, source: dict[str, Any], num_views: int, latents: Sequence[str]
    ) -> None:
        vae, family = self.pipeline.vae, text_family(self.pipeline)
        self.index: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "family": family,
            "vae_id": str(origin),
            "vae_fingerprint": weights_fingerprint(vae),
            "vae_reduction": vae_reduction(vae),
            "scaling_factor": vae.config.scaling_factor,
            "shift_factor": getattr(vae.config, "shift_factor", None),
            "text_encoders": encoder_fingerprints(origin, family),
            "max_sequence_length": self.max_sequence_length,
            "source": source,
            "num_views": num_views,
            "latents": list(latents),
            "latent_channels": vae.config.latent_channels,
            "buckets": [list(size) for size in self.buckets],
        }

    def build(self, items: list[_Item], make: _MakeLatents, batch_size: int) -> PromptCache:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
        shards = self._plan(items)
        self._open_partial(items)
        self.empty = self._make_empty()
        done = 0
        with tqdm(total=len(items), desc=self.folder.name, unit="img", disable=None) as bar:
            for number, rows in enumerate(shards):
                file = self.partial / _shard_name(number)
                if not _is_whole(file, len(rows)):
                    self._write(file, rows, make, batch_size)
                done += len(rows)
                bar.update(done - bar.n)
        index = {
            **self.index,
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

    def _plan(self, items: list[_Item]) -> list[list[_Item]]:
        """Rows of each shard, one bucket after the other."""
        shards = []
        for bucket in range(len(self.buckets)):
            rows = [item for item in items if item.bucket == bucket]
            size = self.items_per_shard
            shards += [rows[start : start + size] for start in range(0, len(rows), size)]
        return shards

    def _open_partial(self, items: list[_Item]) -> None:
        """Makes the partial folder, or checks that the one there is of this very call."""
        digest = hashlib.sha256(repr(items).encode()).hexdigest()[:16]
        plan = {**self.index, "items": digest, "items_per_shard": self.items_per_shard}
        plan["embeddings_dtype"] = str(_encoder_dtype(self.pipeline))
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
            rows = encode_prompts(self.pipeline, [""], self.max_sequence_length)
            empty = {name: value[0].contiguous() for name, value in rows.items()}
            _check_finite(empty, "text encoders")
            _write_whole(file, lambda path: save_file(empty, path))
        return load_file(file)

    def _write(self, file: Path, rows: list[_Item], make: _MakeLatents, batch_size: int) -> None:
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            captions = [item.caption for item in batch]
            embeddings = encode_prompts(self.pipeline, captions, self.max_sequence_length)
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


def _encoder_dtype(pipeline: DiffusionPipeline) -> torch.dtype:
    return pipeline.text_encoder.dtype


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
