"""Options that no released model has: other image sizes, windows and kernels, in small models."""

from typing import Any

import pytest
import timm
import torch

from golden.golden_fill_vision import draw, state_dict
from golden_vision import group, load_vision, relative_error
from lintra.vision import fold_norms, load_official

TOLERANCE = 5e-6

PVT = {"embed_dims": (16, 32, 48, 64), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 3, 4)}
SWIN = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 2, 4)}
CSWIN = {
    "embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (2, 4, 4, 4), "split_sizes": (1, 2, 2, 2),
}  # fmt: skip
WINDOWS = {**SWIN, "linear_window_size": 4, "linear_window_shift": True}
SWIN_SLAB, SWIN_INLINE = (f"swin_tiny_{kind}_patch4_window56_224" for kind in ("slab", "inline"))

# Case of options.json -> our name and arguments.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pvt_prepbn_sizes": ("pvt_tiny_prepbn", PVT),
    "pvt_inline_sizes": (
        "pvt_tiny_inline",
        {**PVT, "attn": ("softmax", "inline", "inline", "softmax")},
    ),
    "pvt_slab_kernel7": (
        "pvt_tiny_slab",
        {
            **PVT,
            "attn": ("sla", "sla", "softmax", "sla"),
            "linear_sr_ratios": (2, 1, 1, 1),
            "sla_kernel_size": 7,
        },
    ),
    "swin_slab_windows": (SWIN_SLAB, WINDOWS),
    "swin_slab_kernel3": (
        SWIN_SLAB,
        {**SWIN, "attn": ("sla", "sla", "sla", "softmax"), "sla_kernel_size": 3},
    ),
    "swin_inline_windows": (SWIN_INLINE, WINDOWS),
    "cswin_slab_kernel3": ("cswin_tiny_slab_224", {**CSWIN, "sla_kernel_size": 3}),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_official(name: str) -> None:
    description, tensors = load_vision("options")
    model_name, arguments = CASES[name]
    model = timm.create_model(model_name, img_size=64, num_classes=10, **arguments).eval()
    report = load_official(model, state_dict(description["cases"][name]["layout"]))
    assert report.resized == []
    expected = group(tensors, f"{name}/")
    assert expected
    images = {
        size: torch.from_numpy(draw("input", (2, 3, *map(int, size.split("x")))))
        for size in expected
    }
    for size, x in images.items():
        assert relative_error(model(x), expected[size]) < TOLERANCE, size
    fold_norms(model)
    for size, x in images.items():
        assert relative_error(model(x), expected[size]) < TOLERANCE, size


def test_description_names_every_case() -> None:
    description, _ = load_vision("options")
    assert set(description["cases"]) == set(CASES)
