"""Access to the measured cases under tests/golden (see golden/README of the reference material)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from golden.golden_fill_diffusion import fill, noise

DIFFUSION = Path(__file__).parent / "golden" / "diffusion"


def case_names(*prefixes: str) -> list[str]:
    """Names of the stored diffusion cases that start with one of `prefixes`."""
    return sorted(path.stem for path in DIFFUSION.glob("*.json") if path.stem.startswith(prefixes))


def load_case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The description and the stored tensors of one case."""
    description = json.loads((DIFFUSION / f"{name}.json").read_text())
    return description, load_file(DIFFUSION / f"{name}.safetensors")


def noise_tensor(spec: dict, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The input that the fill rule makes from `{"name": ..., "shape": ...}`."""
    return torch.from_numpy(noise(spec["name"], spec["shape"])).to(dtype)


def fill_tensor(spec: dict, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The parameter that the fill rule makes from `{"name": ..., "shape": ...}`."""
    return torch.from_numpy(fill(spec["name"], spec["shape"])).to(dtype)


def tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    """`(B, H, N, D)` as the cases store it to the `(B, N, H, D)` of lintra, and back."""
    return tensor.transpose(1, 2)


@pytest.fixture
def exact_exponential(monkeypatch):
    """Rounds as the machine of the cases did.

    PyTorch's float32 exponential has another last bit on some processors. The frequencies of the
    time embedding are exponentials, and multiplied by a thousand: 2.7e-5 in the output of CLEAR.
    """
    exponential = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: exponential(x.double()).to(x.dtype))
