"""Turns an official DiT file into a pipeline folder, of a DiT or of a LiT that inherits from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin

from .checkpoints import dit_name, load_official_dit, read_dit_file
from .inheritance import InheritanceReport, inherit_weights, student_config
from .io import build_dit_pipeline, save_pipeline
from .models.autoencoder_pixel import PixelAutoencoder
from .models.transformer_lit import LiTTransformer2DModel
from .training.config import NoiseConfig

LICENCE_NOTE = (
    "The weights of DiT are under CC-BY-NC-4.0 (attribution, no commercial use). What is derived"
    " from them, converted, inherited or distilled, stays under it."
)
TARGETS = ("dit", "lit")
# Pixels a latent of the autoencoder that DiT was trained with.
_LATENT_FACTOR = 8
_IMAGENET_CLASSES = 1000
_FORM_NOTES = {
    "official": "the authors' (time frequencies 10000^(-i/128), norm_eps 1e-6): outputs are those"
    " of their code; opening it needs lintra",
    "diffusers": "diffusers' (time frequencies 10000^(-i/127), norm_eps 1e-5): any diffusers opens"
    " a DiT, but the outputs of weights trained with the authors' code move",
}
_SAMPLER_NOTE = (
    "DDIM. DiTPipeline drops the predicted variance and guides every latent channel (the authors'"
    " code the first three); for the authors' ancestral steps with the variance hand raw outputs to"
    ' DDPMScheduler.from_config(pipeline.scheduler.config, variance_type="learned_range",'
    ' timestep_spacing="linspace")'
)
_CARD = """---
library_name: diffusers
license: cc-by-nc-4.0
---

```
{report}
```
"""


@dataclass(frozen=True, kw_only=True)
class DiTConversionReport:
    """What `convert_official_dit` read and wrote; `str()` is the text for people.

    Attributes:
        checkpoint: name of the file.
        source: entry of the container that held the weights, "" for a bare state dict.
        name: of the donor, e.g. `DiT-XL/2`.
        config: of the written transformer.
        image_size: side of the images, pixels.
        form: see `load_official_dit`.
        has_null_label: the file has a row for "no class"; without, the row is zeros.
        vae: class of the autoencoder, "" if the folder has none.
        inheritance: what a LiT took of the donor; None for a DiT.
    """

    checkpoint: str
    source: str
    name: str
    config: dict[str, Any]
    image_size: int
    form: str
    has_null_label: bool
    vae: str
    inheritance: InheritanceReport | None = None

    def __str__(self) -> str:
        entry = f"entry {self.source}" if self.source else "a bare state dict"
        classes = self.config["num_embeds_ada_norm"]
        null = f"label {classes} for none" if self.has_null_label else "no label for none"
        variance = self.config["out_channels"] != self.config["in_channels"]
        lines = [
            f"{self.name} from {entry} of {self.checkpoint}",
            f"images: {self.image_size} px, {classes} classes, {null},"
            f" variance {'learned' if variance else 'fixed'}",
            f"form: {_FORM_NOTES[self.form]}",
            f"sampler: {_SAMPLER_NOTE}",
            f"autoencoder: {self.vae or 'none, open with load_pipeline(folder, vae=...)'}",
        ]
        if not self.has_null_label:
            lines.append("guidance: none, the weights were trained without label dropout")
        elif classes != 1000:
            lines.append("guidance: none in DiTPipeline, which takes label 1000 for no class")
        if self.inheritance is not None:
            lines += ["student: LiT, to be distilled before use", str(self.inheritance)]
        return "\n".join([*lines, f"licence: {LICENCE_NOTE}"])


def _load_vae(folder: str | Path | None, channels: int) -> ModelMixin | None:
    if folder is None:
        return PixelAutoencoder(in_channels=channels) if channels in (1, 3) else None
    path = Path(folder)
    path = path / "vae" if (path / "vae").is_dir() else path
    try:
        vae = AutoencoderKL.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`vae` must be the folder of an AutoencoderKL, got {str(folder)!r}: {error}"
        ) from error
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"`vae` must give latents of {channels} channels, got {vae.config.latent_channels}"
        )
    return vae


def _image_size(model: DiTTransformer2DModel, vae: ModelMixin | None) -> int:
    factor = _LATENT_FACTOR
    if isinstance(vae, PixelAutoencoder):
        factor = 1
    elif vae is not None:
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return factor * model.config.sample_size


def _imagenet_labels() -> dict[int, str]:
    from torchvision.models import ResNet50_Weights

    return dict(enumerate(ResNet50_Weights.IMAGENET1K_V2.meta["categories"]))


def read_labels(source: str | Path | Mapping[int, str] | None, num_classes: int) -> dict[int, str]:
    """Class names by number, of a dict or a JSON file: an object by number, or a list.

    None gives those of ImageNet for its 1000 classes, as torchvision spells them, otherwise none.

    Raises:
        ValueError: no such file, another format, or a number that is no class.
    """
    if source is None:
        return _imagenet_labels() if num_classes == _IMAGENET_CLASSES else {}
    names: Any = source
    if isinstance(source, str | Path):
        try:
            names = json.loads(Path(source).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"`id2label` must be a JSON file, got {source!r}: {error}") from error
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError("`id2label` must be names by class number, or a list of names")
    for label in names:
        if not str(label).isdecimal() or int(label) >= num_classes:
            raise ValueError(f"`id2label` must name classes 0 .. {num_classes - 1}, got {label!r}")
    return {int(label): name for label, name in names.items()}


def convert_official_dit(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    to: str = "dit",
    policy: str = "all_but_attention",
    form: str = "official",
    vae: str | Path | None = None,
    id2label: str | Path | Mapping[int, str] | None = None,
    model: str | None = None,
    image_size: int | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    prefer_ema: bool = True,
    seed: int = 0,
    **student: Any,
) -> DiTConversionReport:
    """Saves official DiT weights as a `DiTPipeline` folder that `load_pipeline` opens.

    Args:
        checkpoint: file of the authors, or of their training script.
        folder: to write to, replaced if it exists.
        to: ``dit``, or ``lit`` for a LiT that has inherited the weights and is to be distilled.
        policy: what a LiT inherits, see `inherit_weights`.
        form: see `load_official_dit`.
        vae: folder of the `AutoencoderKL`, or of a pipeline that has one. None: models of 1 or 3
            channels work on pixels; the pipelines of others have none until one is given.
        id2label: names of classes, see `read_labels`; an empty mapping for none.
        model: raises unless the weights are of this model, e.g. ``DiT-XL/2``.
        image_size: raises unless they are of this size, pixels.
        num_heads, num_classes: see `infer_dit_config`.
        prefer_ema: take the averaged weights of a training checkpoint.
        seed: of what a LiT does not inherit.
        student: configuration in which a LiT differs, e.g. `num_linear_heads`.

    Raises:
        ValueError: a file that is not whole or not of a DiT, of another model or size than asked,
            an autoencoder or labels that do not fit.
    """
    if to not in TARGETS:
        raise ValueError(f"`to` must be one of {', '.join(TARGETS)}, got {to!r}")
    source, state = read_dit_file(checkpoint, prefer_ema=prefer_ema)
    donor = load_official_dit(state, form=form, num_heads=num_heads, num_classes=num_classes)
    name = dit_name(donor)
    if model not in (None, name):
        raise ValueError(f"`model` must be that of the checkpoint, {name}, got {model!r}")
    autoencoder = _load_vae(vae, donor.config.in_channels)
    pixels = _image_size(donor, autoencoder)
    if image_size not in (None, pixels):
        raise ValueError(f"`image_size` must be that of the checkpoint, {pixels}, got {image_size}")
    classes = donor.config.num_embeds_ada_norm
    labels = read_labels(id2label, classes)
    transformer, inheritance = donor, None
    if to == "lit":
        config = student_config(LiTTransformer2DModel, donor, student)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = LiTTransformer2DModel(**config)
        inheritance = inherit_weights(transformer.eval(), donor, policy)
    elif student:
        raise ValueError(f"`to` must be lit to change a configuration, got {sorted(student)}")
    report = DiTConversionReport(
        checkpoint=Path(checkpoint).name,
        source=source,
        name=name,
        config=dict(transformer.config),
        image_size=pixels,
        form=form,
        has_null_label=state["y_embedder.embedding_table.weight"].shape[0] > classes,
        vae="" if autoencoder is None else type(autoencoder).__name__,
        inheritance=inheritance,
    )
    # Images lie in [-1, 1], latents do not.
    in_pixels = isinstance(autoencoder, PixelAutoencoder)
    scheduler = DDIMScheduler(**asdict(NoiseConfig()), clip_sample=in_pixels)
    pipeline = build_dit_pipeline(transformer, autoencoder, scheduler, labels)
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    save_pipeline(pipeline, folder, {"README.md": _CARD.format(report=report)})
    return report
