"""Access to the measured vision cases under tests/golden/vision (formats: FORMAT.md there)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

VISION = Path(__file__).parent / "golden" / "vision"


def load_vision(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The description and the stored tensors of one case."""
    description = json.loads((VISION / f"{name}.json").read_text())
    return description, load_file(VISION / f"{name}.safetensors")


def group(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under `prefix`, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    result, expected = result.detach().double(), expected.detach().double()
    return float((result - expected).abs().max() / expected.abs().max())


def layouts() -> dict[str, list]:
    """Every official variant's ordered `[key, shape, dtype]` rows."""
    file = json.loads((VISION / "layouts.json").read_text())
    return {name: _expand(entry, file["templates"]) for name, entry in file["variants"].items()}


def _expand(entry: dict, templates: dict[str, list]) -> list:
    rows = []
    for row in entry["rows"]:
        if isinstance(row, list):
            rows.append(row)
            continue
        for index in range(row["first"], row["last"] + 1):
            rows += [
                [f"{row['blocks']}{index}.{suffix}", *rest]
                for suffix, *rest in templates[row["template"]]
            ]
    return rows
