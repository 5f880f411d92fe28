"""What runs of a study learn from: labelled images, and class names as prompts of text to image."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.assemble_text import build_vae
from ..training.buckets import Size
from ..training.config import check_field
from ..training.images import ImageSource, open_recipe_images
from ..training.memory import InMemoryImages
from ..training.prompt_cache import PromptCache
from ..training.prompt_cache_build import build_prompt_cache
from ..training.prompt_cache_writer import Encoders
from .config import TEACHER, Study

_BATCH_SIZE = 256
_ITEMS_PER_SHARD = 1024


def open_source(study: Study, run: str = TEACHER) -> ImageSource:
    """The images that a run is trained on and measured against."""
    return open_recipe_images(study.recipe(run).data if study.images is None else study.image_data)


@dataclass(frozen=True)
class WordEmbeddings:
    """A text encoder that has learnt nothing: every word is a fixed random vector.

    Enough to tell class names apart, as a table of class embeddings would, without the weights of
    a language model. A word's vector is unit normal from the seed ``sha256(word)``, in lower case.

    Args:
        tokens: L, words of a prompt at most; the rest of it is zero, as is the empty prompt.
        channels: D of a token.
        pooled_channels: P of the pooled embedding, ``sum of the words / sqrt(their number)``.
    """

    tokens: int
    channels: int
    pooled_channels: int

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds`` ``(N, L, D)`` and ``pooled_prompt_embeds`` ``(N, P)``, float32.

        Raises:
            ValueError: a prompt of too many words.
        """
        embeds = torch.zeros(len(prompts), self.tokens, self.channels)
        pooled = torch.zeros(len(prompts), self.pooled_channels)
        for row, prompt in enumerate(prompts):
            words = prompt.lower().split()
            fits = len(words) <= self.tokens
            check_field(fits, "prompt_tokens", f"be {len(words)} for {prompt!r}", self.tokens)
            for place, word in enumerate(words):
                vector = _vector(word, self.channels + self.pooled_channels)
                embeds[row, place] = vector[: self.channels]
                pooled[row] += vector[self.channels :] / len(words) ** 0.5
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def __str__(self) -> str:
        return f"random words, {self.tokens} x {self.channels}, pooled {self.pooled_channels}"


def _vector(word: str, channels: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed))


def word_embeddings(study: Study) -> WordEmbeddings:
    """Of the widths that the study's teacher takes."""
    config = study.teacher_recipe().model.config
    names = ("joint_attention_dim", "pooled_projection_dim")
    for name in names:
        check_field(name in config, "teacher", f"have {name} in its config", config)
    channels, pooled_channels = (config[name] for name in names)
    return WordEmbeddings(study.prompt_tokens, channels, pooled_channels)


@dataclass(frozen=True)
class _Named:
    """An image whose caption is the name of its class."""

    images: InMemoryImages
    index: int
    caption: str

    @property
    def name(self) -> str:
        return f"{self.index:08d}"

    def size(self) -> Size:
        height, width = self.images.images.shape[-2:]
        return height, width

    def read(self) -> Tensor:
        return self.images.images[self.index]


def make_cache(study: Study) -> PromptCache | None:
    """The prompt cache of a text-to-image study, made unless it is there; None for classes.

    Raises:
        ValueError: a class name of too many words; as of `build_prompt_cache`.
    """
    if study.images is None:
        return None
    if study.cache.is_dir():
        return PromptCache(study.cache)
    source, recipe = open_source(study), study.teacher_recipe()
    encode = word_embeddings(study)
    encode(source.classes)  # fails before a thousand images are decoded
    encoders = Encoders(
        family=recipe.model.family,
        vae=build_vae(recipe, None),
        encode=encode,
        origin=recipe.model.vae or "pixels",
        text_encoders={"words": str(encode)},
        max_sequence_length=study.prompt_tokens,
    )
    images = InMemoryImages(source)
    names = [source.classes[label] for label in source.labels.tolist()]
    return build_prompt_cache(
        encoders,
        study.cache,
        [_Named(images, index, name) for index, name in enumerate(names)],
        buckets=[(source.resolution, source.resolution)],
        random_flip=study.image_data.random_flip,
        batch_size=_BATCH_SIZE,
        items_per_shard=_ITEMS_PER_SHARD,
    )
