"""Depthwise token convolution in plain PyTorch: runs on every device, serves as the oracle."""

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
) -> Tensor:
    """The operation of `api.token_conv2d`."""
    dtype = accumulation_dtype(tokens.dtype)
    conv = _static_conv if weight.ndim == 3 else _per_sample_conv
    with no_autocast(tokens.device.type):
        image = tokens.to(dtype).transpose(1, 2).unflatten(2, grid)  # (B, C, h, w), channels last
        out = conv(image, weight.to(dtype)).flatten(2).transpose(1, 2)  # (B, N, C)
        if bias is not None:
            out = out + bias.to(dtype)
        if residual is not None:
            out = out + residual.to(dtype)
        return out.to(tokens.dtype)
