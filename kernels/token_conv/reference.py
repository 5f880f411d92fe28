"""Depthwise token convolution in plain PyTorch: runs on every device, serves as the oracle."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common.precision import accumulation_dtype, no_autocast


def _static_conv(image: Tensor, weight: Tensor) -> Tensor:
    """`image` (B, C, h, w), one kernel (C, k, k) for all samples."""
    return F.conv2d(image, weight[:, None], padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _per_sample_conv(image: Tensor, weight: Tensor) -> Tensor:
    """`image` (B, C, h, w), one kernel (B, C, k, k) a sample.

    k * k shifted multiply-adds: a convolution with B * C groups would bake the batch size into
    exported graphs.
    """
    height, width = image.shape[-2:]
    size = weight.shape[-1]
    padded = F.pad(image, [size // 2] * 4)
    out = image.new_zeros(())
    for dy in range(size):
        for dx in range(size):
            shifted = padded[..., dy : dy + height, dx : dx + width]
            out = out + shifted * weight[..., dy, dx, None, None]
    return out


def token_conv2d_reference(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    grid: tuple[int, int],
    residual: Tensor | None,
    num_prefix_tokens: int,
) -> Tensor:
    """The operation of `api.token_conv2d`."""
    dtype = accumulation_dtype(tokens.dtype)
    conv = _static_conv if weight.ndim == 3 else _per_sample_conv
    repeats = tokens.shape[-1] // weight.shape[-3]
    with no_autocast(tokens.device.type):
        patches = tokens[:, num_prefix_tokens:].to(dtype)
        image = patches.transpose(1, 2).unflatten(2, grid)  # (B, C, h, w), channels last
        weight = weight.to(dtype)
        if repeats > 1:
            weight = torch.cat([weight] * repeats, dim=-3)
        out = conv(image, weight).flatten(2).transpose(1, 2)  # (B, h * w, C)
        if bias is not None:
            out = out + bias.to(dtype).repeat(repeats)
        if num_prefix_tokens:
            out = F.pad(out, (0, 0, num_prefix_tokens, 0))
        if residual is not None:
            out = out + residual.to(dtype)
        return out.to(tokens.dtype)
