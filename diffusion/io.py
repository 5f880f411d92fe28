"""Opening, checking and changing pipelines and transformers that hold lintra's models."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
)
from diffusers.models.modeling_utils import ModelMixin

from .models.transformer_clear_flux import ClearFluxTransformer2DModel
from .models.transformer_clear_sd3 import ClearSD3Transformer2DModel
from .models.transformer_dit import OfficialDiTTransformer2DModel
from .models.transformer_lit import LiTTransformer2DModel
from .models.transformer_lit_pixart import LiTPixArtTransformer2DModel

# `_class_name` in a transformer's config.json -> class; what load_transformer can open
TRANSFORMERS: dict[str, type[ModelMixin]] = {
    cls.__name__: cls
    for cls in (
        DiTTransformer2DModel,
        OfficialDiTTransformer2DModel,
        LiTTransformer2DModel,
        PixArtTransformer2DModel,
        LiTPixArtTransformer2DModel,
        FluxTransformer2DModel,
        ClearFluxTransformer2DModel,
        SD3Transformer2DModel,
        ClearSD3Transformer2DModel,
    )
}
# Configuration that the rest of a pipeline depends on.
_INTERFACE = (
    "in_channels",
    "out_channels",
    "num_embeds_ada_norm",
    "caption_channels",
    "cross_attention_dim",
    "guidance_embeds",
    "joint_attention_dim",
    "pooled_projection_dim",
)


def _read_json(file: Path, what: str) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"`path` must be {what}, but there is no file {file}")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"`path` must hold valid JSON in {file}, got: {error}") from error


def read_index(path: str | Path) -> dict[str, Any]:
    """model_index.json of a pipeline folder: component -> [library, class], and its settings.

    Raises:
        FileNotFoundError: no such file. ValueError: one that is no JSON.
    """
    return _read_json(Path(path) / "model_index.json", "a pipeline folder")


def load_transformer(path: str | Path, **kwargs: Any) -> ModelMixin:
    """Opens a saved transformer with the class that its config.json names.

    `SomeOtherModel.from_pretrained` would open a LiT folder as a softmax DiT with no more than a
    warning; this function does not.

    Args:
        path: folder with config.json and weights, or a pipeline folder that has `transformer/`.
        kwargs: passed to `from_pretrained`, e.g. `torch_dtype`.

    Raises:
        FileNotFoundError: no such folder. ValueError: a class that is not in `TRANSFORMERS`.
    """
    folder = Path(path)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    elif (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"`path` must have a folder transformer, got a pipeline without one in {folder}"
        )
    name = _read_json(folder / "config.json", "a transformer folder").get("_class_name")
    if name not in TRANSFORMERS:
        raise ValueError(
            f"`path` must hold one of {', '.join(TRANSFORMERS)}, got {name!r} in {folder}"
        )
    return TRANSFORMERS[name].from_pretrained(folder, **kwargs)


def _check_transformer_class(folder: Path, index: dict[str, Any]) -> None:
    config = folder / "transformer" / "config.json"
    if "transformer" not in index or not config.is_file():
        return
    named, saved = index["transformer"][1], _read_json(config, "a pipeline folder")["_class_name"]
    if named != saved:
        raise ValueError(
            f"`path` must name the class of its transformer in model_index.json, got {named} there"
            f" and {saved} in {config}: it would open with other attention than it was saved with"
        )


def _absent_components(folder: Path, index: dict[str, Any], given: set[str]) -> list[str]:
    """Components that were saved as None; raises if one that was not has no folder."""
    components = {n: v for n, v in index.items() if isinstance(v, list) and len(v) == 2}
    for name, (library, _) in components.items():
        part = folder / name
        is_there = part.is_dir() and any(part.iterdir())
        if library is not None and name not in given and not is_there:
            raise FileNotFoundError(
                f"`path` must have a folder for each component of its pipeline, got none for {name}"
                f" in {folder}"
            )
    return [name for name, (library, _) in components.items() if library is None]


def load_pipeline(path: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Opens a saved pipeline, also one that holds a model of lintra.

    diffusers opens classes of third parties only if their module was imported, which importing
    this function has done.

    Args:
        path: pipeline folder, or a repository id on the Hub.
        kwargs: passed to `DiffusionPipeline.from_pretrained`, e.g. `torch_dtype`, or a component
            that the folder lacks, e.g. `vae`.

    Raises:
        FileNotFoundError: a local path without model_index.json or the folder of a component.
        ValueError: model_index.json and the transformer's config disagree about its class.
    """
    folder = Path(path)
    if folder.is_absolute() or str(path).startswith(".") or folder.exists():
        index = read_index(folder)
        absent = _absent_components(folder, index, set(kwargs))
        _check_transformer_class(folder, index)
        kwargs = {**dict.fromkeys(absent), **kwargs}
        if index.get("id2label") and "id2label" not in kwargs:
            # JSON turned the class numbers into strings.
            kwargs["id2label"] = {int(label): name for label, name in index["id2label"].items()}
        for name, entry in index.items():
            if entry == [None, None]:  # saved without, e.g. text encoders: diffusers asks again
                kwargs.setdefault(name, None)
    pipeline = DiffusionPipeline.from_pretrained(path, **kwargs)
    if kwargs.get("id2label"):
        # The pipeline does not record this argument: it would be lost when saved again.
        pipeline.register_to_config(id2label=kwargs["id2label"])
    return pipeline


def swap_transformer(pipeline: DiffusionPipeline, transformer: ModelMixin) -> DiffusionPipeline:
    """Puts `transformer` into `pipeline`, in place, moved to the old one's device and dtype.

    `pipeline.save_pretrained` then records the new class, and `load_pipeline` opens it again.

    Returns:
        The pipeline.

    Raises:
        ValueError: the pipeline has no transformer, or the two differ in channels or classes.
    """
    old = getattr(pipeline, "transformer", None)
    if old is None:
        raise ValueError(f"`pipeline` must have a transformer, got a {type(pipeline).__name__}")
    differing = [
        f"{key} {transformer.config.get(key)} != {old.config.get(key)}"
        for key in _INTERFACE
        if transformer.config.get(key) != old.config.get(key)
    ]
    if differing:
        raise ValueError(f"`transformer` must fit the pipeline, got {', '.join(differing)}")
    pipeline.register_modules(transformer=transformer.to(device=old.device, dtype=old.dtype))
    return pipeline


def build_dit_pipeline(
    transformer: ModelMixin,
    vae: ModelMixin | None,
    scheduler: SchedulerMixin,
    id2label: dict[int, str],
) -> DiTPipeline:
    """A `DiTPipeline` whose class names are saved with it.

    Args:
        transformer: DiT or LiT.
        vae: None if it is to be given when the saved pipeline is opened.
        scheduler: sampler.
        id2label: names of classes, may be empty.
    """
    pipeline = DiTPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, id2label=id2label or None
    )
    # The pipeline does not record this argument itself; a reopened one would have no labels.
    pipeline.register_to_config(id2label=id2label or None)
    return pipeline


def replace_folder(partial: Path, folder: Path) -> None:
    """Puts the finished `partial` in the place of `folder`, which is whole at every moment."""
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _link_parts(origin: Path, folder: Path, parts: Sequence[str]) -> None:
    """Puts components of the pipeline folder `origin` into `folder`, linked where that is possible.

    Text encoders of many gigabytes that nobody has changed need not be written again.
    """
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text())
    theirs = _read_json(origin / "model_index.json", "a pipeline folder")
    for name in parts:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, folder / name, copy_function=_link_or_copy)
            index[name] = theirs[name]
    index_file.write_text(json.dumps(index, indent=2) + "\n")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def save_pipeline(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    texts: Mapping[str, str] | None = None,
    *,
    origin: Path | None = None,
    parts: Sequence[str] = (),
) -> None:
    """`pipeline.save_pretrained` that leaves nothing half: an interruption keeps the old folder.

    Args:
        pipeline: what is saved.
        folder: its folder, replaced if it exists.
        texts: further files to put there, name -> content.
        origin: pipeline folder that has the `parts` which the pipeline lacks.
        parts: components that are linked from there.
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    if origin is not None:
        _link_parts(origin, partial, parts)
    for name, text in (texts or {}).items():
        (partial / name).write_text(text)
    replace_folder(partial, folder)
