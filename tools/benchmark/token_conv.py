"""Cases of the token convolution: SLA, LiT and InLine maps, against cuDNN in channels-last."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lintra import kernels

from .case import Case, check_shape, compiled, eager

LAYOUT = "B,h,w,C,k[,residual[,per_sample]]"
# (B, h, w, C, k, residual, one kernel a sample)
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "DeiT": [
        (256, 14, 14, 192, 5, 0, 0),
        (256, 14, 14, 192, 5, 1, 0),
        (256, 14, 14, 192, 3, 0, 0),
        (256, 14, 14, 192, 3, 1, 1),
    ],
    "windows": [(4096, 7, 7, 96, 5, 0, 0)],
    "PVT / Swin": [(64, 56, 56, 64, 5, 0, 0)],
    "LiT": [
        (32, 16, 16, 1152, 5, 1, 0),
        (16, 64, 64, 1152, 5, 0, 0),
        (16, 64, 64, 1152, 5, 1, 0),
        (16, 64, 64, 1152, 3, 0, 0),
    ],
}
TINY = [(2, 5, 4, 8, 5, 1, 0), (2, 4, 6, 8, 3, 0, 1)]
_TARGETS = {
    ("fwd", "floor"): 2.0,
    ("fwd", "cudnn"): 2.5,
    ("bwd", "cudnn"): 2.0,
}


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    batch, height, width, channels, size, residual, per_sample = shape
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    tokens = torch.randn(batch, height * width, channels, **options)
    lead = (batch,) if per_sample else ()
    weight = torch.randn(*lead, channels, size, size, **options) / size
    inputs = [tokens, weight, torch.randn(channels, **options)]
    if residual:
        inputs.append(torch.randn_like(tokens))
    return [x.requires_grad_() for x in inputs]


def _convolve(
    impl: str,
    grid: tuple[int, int],
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    return kernels.token_conv2d(tokens, weight, bias, grid=grid, residual=residual, impl=impl)


def torch_convolution(
    grid: tuple[int, int],
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """What models do without this package: conv2d on the tokens seen as a channels-last image."""
    image = tokens.transpose(1, 2).unflatten(2, grid)  # (B, C, h, w), channels last
    padding = weight.shape[-1] // 2
    if weight.ndim == 3:
        out = F.conv2d(image, weight[:, None], bias, padding=padding, groups=weight.shape[0])
    else:
        # InLine's own code: the batch becomes groups of one image.
        filters = weight.flatten(0, 1)[:, None]
        folded = image.reshape(1, -1, *grid)
        out = F.conv2d(folded, filters, padding=padding, groups=filters.shape[0])
        out = out.view_as(image) + bias[:, None, None]
    out = out.flatten(2).transpose(1, 2)
    return out if residual is None else out + residual


def build(shape: Sequence[int], group: str = "custom", with_targets: bool = False) -> Case:
    """The case of (B, h, w, C, k, residual, per_sample), the last two 0 if left out."""
    check_shape(shape, (5, 6, 7), LAYOUT)
    shape = (*shape, *(0, 0)[len(shape) - 5 :])
    batch, height, width, channels, size, residual, per_sample = shape
    grid = (height, width)
    elements = batch * height * width * channels
    taps = (batch if per_sample else 1) * channels * size * size
    label = f"{batch}x{height}x{width}x{channels} {size}x{size}"
    words = [word for word, on in (("residual", residual), ("per-sample", per_sample)) if on]
    reference = partial(_convolve, "reference", grid)
    return Case(
        op="token_conv2d",
        group=group,
        shape=" ".join([label, *words]),
        make=partial(_inputs, shape),
        ours=eager(partial(_convolve, "auto", grid)),
        reference=reference,
        floor_bytes=lambda element: ((2 + residual) * elements + taps) * element,
        flops=2.0 * elements * size * size,
        peers={
            "cudnn": eager(partial(torch_convolution, grid)),
            "eager": eager(reference),
            "compiled": compiled(reference),
        },
        targets=_TARGETS if with_targets else {},
    )


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [build(shape) for shape in TINY]
    return [build(shape, group, True) for group, shapes in SHAPES.items() for shape in shapes]
