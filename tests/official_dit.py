"""Official DiT checkpoints made of the golden fill rule."""

from pathlib import Path

import torch

from golden_cases import case_names, fill_tensor, load_case

CASES = case_names("D_dit")


def official_state(case: str) -> dict[str, torch.Tensor]:
    """The weights of a golden case by official name."""
    description, tensors = load_case(case)
    shapes = description["weights"]["shapes"]
    state = {key: fill_tensor({"name": key, "shape": shape}) for key, shape in shapes.items()}
    return {**state, "pos_embed": tensors["pos_embed"]}


def official_file(folder: Path, case: str = "D_dit_s2like", **entries: object) -> Path:
    """A bare state dict, or the container `entries` with it as `ema`."""
    state = official_state(case)
    path = folder / "official.pt"
    torch.save({**entries, "ema": state} if entries else state, path)
    return path


def arguments_of(case: str) -> dict[str, int]:
    """What no shape tells."""
    config = load_case(case)[0]["config"]
    return {"num_heads": config["num_heads"], "num_classes": config["num_classes"]}
