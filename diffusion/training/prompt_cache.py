"""Precomputed latents and prompt embeddings, in safetensors shards of one size each."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .buckets import Size
from .shards import Shards, open_shard, read_index

FORMAT_VERSION = 1
EMPTY_NAME = "empty.safetensors"
WHAT = "prompt"
LATENTS = ("mean", "std")
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
_INDEX_KEYS = (
    "format_version",
    "family",
    "vae_id",
    "vae_fingerprint",
    "vae_reduction",
    "scaling_factor",
    "shift_factor",
    "text_encoders",
    "max_sequence_length",
    "source",
    "count",
    "num_views",
    "latents",
    "latent_channels",
    "embeddings",
    "buckets",
    "shards",
)


class PromptCache(Dataset):
    """What `build_prompt_cache` wrote; every shard holds images of one bucket.

    An item is a dict of ``mean`` ``(V, c, h, w)`` float32 (and ``std`` where a VAE has encoded
    images: a latent is ``mean + std * noise``), ``prompt_embeds`` ``(L, D)``, and where the
    pipeline has them ``pooled_prompt_embeds`` ``(P,)`` and ``prompt_attention_mask`` ``(L,)`` bool.
    ``V`` is `num_views`: 2 where the mirrored images were stored too. Latents are as the model sees
    them, ``(z - shift) * scale``.

    Args:
        folder: the cache.
        family: `flux`, `sd3` or `pixart`, whose embeddings it must hold; None takes any.
        vae_fingerprint: `weights_fingerprint` of the VAE in use; None takes any.
        text_encoders: `encoder_fingerprints` of the pipeline in use; None takes any.

    Attributes:
        buckets: sizes ``(height, width)`` in pixels.
        bucket_of: number of the bucket of each item, ``(N,)`` int64.
        empty: embeddings of the empty prompt, without the row dimension.
        index: everything that it was made with.

    Raises:
        ValueError: no cache, one of another family, VAE or text encoder, a missing, truncated or
            inconsistent shard.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        family: str | None = None,
        vae_fingerprint: str | None = None,
        text_encoders: Mapping[str, str] | None = None,
    ):
        self.folder = Path(folder)
        self.index = read_index(self.folder, _INDEX_KEYS, FORMAT_VERSION, WHAT)
        self._check_origin(family, vae_fingerprint, text_encoders)
        self.buckets: list[Size] = [(height, width) for height, width in self.index["buckets"]]
        self.num_views: int = self.index["num_views"]
        self._latents = tuple(self.index["latents"])
        self._embeddings = {name: tuple(shape) for name, shape in self.index["embeddings"].items()}
        self._shards = Shards(self.folder, self.index["shards"], WHAT)
        for number in range(len(self._shards.counts)):
            self._check_shard(number)
        if len(self._shards) != self.index["count"]:
            raise ValueError(
                f"prompt cache {self.folder} must hold {self.index['count']} items,"
                f" got {len(self._shards)}"
            )
        self.bucket_of = torch.tensor(
            [shard["bucket"] for shard in self.index["shards"] for _ in range(shard["count"])]
        )
        self.empty = self._read_empty()

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._shards.row(index, (*self._latents, *self._embeddings))
        return row | {name: row[name].float() for name in self._latents}

    def read_bucket(self, bucket: int, device: torch.device | str) -> dict[str, Tensor]:
        """All rows of a bucket on `device`, in their order; latents in float32."""
        numbers = [n for n, shard in enumerate(self.index["shards"]) if shard["bucket"] == bucket]
        rows = {}
        for name in (*self._latents, *self._embeddings):
            parts = [self._shards.handle(n).get_tensor(name).to(device) for n in numbers]
            rows[name] = torch.cat(parts)
        return rows | {name: rows[name].float() for name in self._latents}

    def name_and_caption(self, index: int) -> tuple[str, str]:
        """Name of an item's image and its prompt."""
        shard, row = self._shards.locate(index)
        metadata = self._shards.handle(shard).metadata()
        return json.loads(metadata["names"])[row], json.loads(metadata["captions"])[row]

    def check_vae(self, fingerprint: str) -> None:
        """Raises ValueError unless the latents are those of this VAE."""
        index = self.index
        if fingerprint != index["vae_fingerprint"]:
            raise ValueError(
                f"prompt cache {self.folder} must be made with the VAE {fingerprint},"
                f" got one made with {index['vae_fingerprint']} ({index['vae_id']})"
            )

    def _check_origin(
        self,
        family: str | None,
        vae_fingerprint: str | None,
        text_encoders: Mapping[str, str] | None,
    ) -> None:
        index = self.index
        if family not in (None, index["family"]):
            raise ValueError(
                f"prompt cache {self.folder} must be made for {family}, got {index['family']}"
            )
        if vae_fingerprint is not None:
            self.check_vae(vae_fingerprint)
        if text_encoders is not None and dict(text_encoders) != index["text_encoders"]:
            raise ValueError(
                f"prompt cache {self.folder} must be made with the text encoders"
                f" {dict(text_encoders)}, got one made with {index['text_encoders']}"
            )

    @staticmethod
    def shapes(file: Path) -> dict[str, list[int]]:
        """Names and shapes of the tensors of one shard."""
        handle = open_shard(file, WHAT)
        return {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118

    def _check_shard(self, number: int) -> None:
        shard = self.index["shards"][number]
        count, reduction = shard["count"], self.index["vae_reduction"]
        height, width = (side // reduction for side in self.buckets[shard["bucket"]])
        latent = [count, self.num_views, self.index["latent_channels"], height, width]
        expected = dict.fromkeys(self._latents, latent)
        expected |= {name: [count, *shape] for name, shape in self._embeddings.items()}
        self._shards.check(number, expected)

    def _read_empty(self) -> dict[str, Tensor]:
        handle = open_shard(self.folder / EMPTY_NAME, WHAT)
        found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if shapes != self._embeddings:
            raise ValueError(
                f"{self.folder / EMPTY_NAME} must hold {self._embeddings}, got {shapes}"
            )
        return found


def describe(cache: PromptCache) -> str:
    """A few lines for people: where the cache comes from and what it holds."""
    index: dict[str, Any] = cache.index
    counts = torch.bincount(cache.bucket_of, minlength=len(cache.buckets)).tolist()
    sizes = [
        f"  {height} x {width}: {count}"
        for (height, width), count in zip(cache.buckets, counts, strict=True)
        if count
    ]
    head = f"{len(cache)} items for {index['family']} from {index['source']['kind']}, VAE"
    return "\n".join([f"{head} {index['vae_id']} ({index['vae_fingerprint']})", *sizes])
