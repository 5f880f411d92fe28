"""Turns official CLEAR weights and a stock FLUX folder into a pipeline folder."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from .clear_weights import (
    load_clear_weights,
    official_variant,
    pooling_factors,
    read_clear_file,
)
from .inheritance import student_config
from .io import read_index, replace_folder
from .models.transformer_clear_flux import ClearFluxTransformer2DModel

LICENCE_NOTE = (
    "CLEAR's code is under Apache-2.0, but its weights were trained from FLUX.1-dev, whose licence"
    " does not allow commercial use. What is derived from either stays under the terms of the base"
    " model: read them before use."
)
_BASE_CLASS = FluxTransformer2DModel.__name__
# Beside the folders of the components, what of a base folder belongs to every copy of it.
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
_CARD = """---
library_name: diffusers
license: other
---

```
{report}
```
"""


@dataclass(frozen=True, kw_only=True)
class ClearConversionReport:
    """What `convert_clear` read and wrote; `str()` is the text for people.

    Attributes:
        checkpoint: name of the file.
        base: the stock pipeline.
        radius, down_factor: of the weights.
        replaced: tensors of the transformer that the file replaced, and their numbers.
        dtype: of the written transformer.
    """

    checkpoint: str
    base: str
    radius: float
    down_factor: int | None
    replaced: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        pooled = "" if self.down_factor is None else f", keys pooled {self.down_factor} x"
        count, numbers = self.replaced
        return "\n".join(
            [
                f"FLUX with CLEAR attention, radius {self.radius:g}{pooled}",
                f"{count} tensors ({numbers:,} numbers) of {self.checkpoint}, the rest of"
                f" {self.base}, in {str(self.dtype).removeprefix('torch.')}",
                f"licence: {LICENCE_NOTE}",
            ]
        )


def _variant(
    path: Path, weights: Mapping[str, Tensor], radius: float | None, down_factor: int | None
) -> tuple[float, int | None]:
    """Radius and down factor, on which name, tensors and arguments must agree."""
    factors = pooling_factors(weights)
    if len(factors) > 1:
        raise ValueError(
            f"`checkpoint` must hold pooling kernels of one size, got {sorted(factors)}"
        )
    held = next(iter(factors), None)
    named = official_variant(path)
    if named is not None and named[1] != held:
        raise ValueError(
            f"`checkpoint` must hold what its name says, down factor {named[1]}, got {held} in"
            f" {path.name}"
        )
    if down_factor not in (None, held):
        raise ValueError(f"`down_factor` must be that of the checkpoint, {held}, got {down_factor}")
    if named is None and radius is None:
        raise ValueError(
            "`radius` must be given for a file without an official name, such as"
            f" clear_local_16.safetensors, got {path.name}: the weights do not tell it"
        )
    if named is not None and radius not in (None, named[0]):
        raise ValueError(
            f"`radius` must be that of the checkpoint, {named[0]}, got {radius} for {path.name}"
        )
    return (named[0] if radius is None and named else radius), held  # type: ignore[return-value]


def _base_config(base: Path) -> dict[str, Any]:
    """The configuration of the stock transformer in `base`."""
    index = read_index(base)
    found = index.get("transformer", [None, None])[1]
    if found != _BASE_CLASS:
        raise ValueError(
            f"`base` must be the folder of a FLUX pipeline, with a {_BASE_CLASS}, got"
            f" {found or 'no'} transformer in {base}"
        )
    file = base / "transformer" / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"`base` must hold its transformer, but there is no {file}")
    return json.loads(file.read_text())


def _open_base(base: Path, dtype: torch.dtype | None) -> FluxTransformer2DModel:
    try:
        return FluxTransformer2DModel.from_pretrained(
            base, subfolder="transformer", local_files_only=True, dtype=dtype
        )
    except Exception as error:  # huggingface_hub, safetensors and diffusers each have their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"`base` must hold a whole transformer, got {base}: {reason}") from error


def convert_clear(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    base: str | Path,
    radius: float | None = None,
    down_factor: int | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> ClearConversionReport:
    """Saves FLUX with official CLEAR weights as a pipeline folder that `load_pipeline` opens.

    Args:
        checkpoint: `clear_local_<radius>[_down_<factor>].safetensors` of the authors, or another
            file in its layout (see `load_clear_weights`).
        folder: to write to, replaced if it exists.
        base: folder of the stock pipeline, e.g. FLUX.1-dev. Its other components are copied.
        radius: of the weights; needed if the name of the file does not tell it.
        down_factor: raises unless the weights have pooling kernels of this size.
        dtype: of the written transformer; None for float32. FLUX is published in bfloat16.

    Raises:
        FileNotFoundError: no such checkpoint or base.
        ValueError: a file that is cut off, of another variant than its name, `radius` or
            `down_factor` say or of another model than the base; a base that is no stock FLUX.
            Nothing is written then.
    """
    checkpoint, folder, base = Path(checkpoint), Path(folder), Path(base)
    stock = _base_config(base)
    if folder.resolve() == base.resolve():
        raise ValueError(f"`folder` must not be the base, which it would replace, got {folder}")
    weights = read_clear_file(checkpoint)
    radius, down_factor = _variant(checkpoint, weights, radius, down_factor)
    changes = {"radius": radius, "down_factor": down_factor}
    config = {name: value for name, value in stock.items() if not name.startswith("_")}
    with torch.device("meta"):
        empty = ClearFluxTransformer2DModel(
            **student_config(ClearFluxTransformer2DModel, None, {**config, **changes})
        )
    load_clear_weights(empty, weights)  # checks names and shapes before the base is read

    model = ClearFluxTransformer2DModel.from_teacher(_open_base(base, dtype), **changes)
    load_clear_weights(model, weights)
    report = ClearConversionReport(
        checkpoint=checkpoint.name,
        base=base.resolve().name,
        radius=radius,
        down_factor=down_factor,
        replaced=(len(weights), sum(tensor.numel() for tensor in weights.values())),
        dtype=model.dtype,
    )
    _save(model, base, folder, _CARD.format(report=report))
    return report


def _save(model: ClearFluxTransformer2DModel, base: Path, folder: Path, card: str) -> None:
    """Copies the other components as files, so that gigabytes of text encoders are not opened."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    index = read_index(base)
    for name, entry in index.items():
        if name != "transformer" and isinstance(entry, list) and (base / name).is_dir():
            shutil.copytree(base / name, partial / name)
    for pattern in _LICENCES:
        for file in filter(Path.is_file, base.glob(pattern)):
            shutil.copy(file, partial / file.name)
    model.save_pretrained(partial / "transformer")
    index["transformer"] = [type(model).__module__, type(model).__name__]
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (partial / "README.md").write_text(card)
    replace_folder(partial, folder)
