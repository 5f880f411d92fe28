"""What `lintra bench` can time: operations, their shapes, and the peers they must beat."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lintra.kernels import linear_attention, token_conv2d

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """One thing to time.

    Args:
        cases: sizes by name; the first is small enough for the check and for a CPU.
        inputs: tensors of one case, of a device and dtype; all of them get gradients.
        functions: what runs on them, by name: "lintra" first, then the peers.
        reference: the same in plain PyTorch, for the check.
        moved: how many numbers the forward pass must read and write at least.
    """

    cases: dict[str, tuple[int, ...]]
    inputs: Callable[[tuple[int, ...], str, torch.dtype], list[Tensor]]
    functions: Callable[[tuple[int, ...]], dict[str, Function]]
    reference: Callable[[tuple[int, ...]], Function]
    moved: Callable[[tuple[int, ...]], int]


def _attention_inputs(sizes: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    batch, tokens, heads, channels = sizes
    qkv = torch.randn(batch, tokens, 3, heads, channels, device=device, dtype=dtype)
    return list(qkv.unbind(2))


def _softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _attention(feature_map: str, normalizer: str) -> Operation:
    def run(impl: str) -> Function:
        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return linear_attention(
                query, key, value, feature_map=feature_map, normalizer=normalizer, impl=impl
            )

        return function

    return Operation(
        cases={
            "tiny": (2, 65, 2, 32),  # (B, N, H, D)
            "deit_tiny": (256, 197, 3, 64),
            "deit_small": (256, 197, 6, 64),
            "deit_heads32": (256, 197, 6, 32),
            "windows": (4096, 49, 3, 32),
            "pvt_stage1": (64, 3136, 1, 64),
            "swin_stage1": (64, 3136, 3, 32),
            "swin_stage2": (64, 784, 6, 32),
            "dit_256": (64, 256, 16, 72),
            "dit_1024": (16, 4096, 16, 72),
            "dit_2048": (2, 16384, 16, 72),
            "long": (1, 65536, 24, 128),
            "lit_s_256": (64, 256, 2, 192),
            "lit_xl_256": (64, 256, 4, 288),
            "lit_xl_512": (16, 1024, 4, 288),
            "lit_xl_2048": (1, 16384, 4, 288),
        },
        inputs=_attention_inputs,
        functions=lambda sizes: {
            "lintra": run("auto"),
            "sdpa": _softmax,
            "eager": run("reference"),
            "compiled": torch.compile(run("reference"), dynamic=False),
        },
        reference=lambda sizes: run("reference"),
        moved=lambda sizes: 4 * sizes[0] * sizes[1] * sizes[2] * sizes[3],
    )


def _convolution(size: int) -> Operation:
    """With bias and residual, as in the layers that use it."""

    def inputs(sizes: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
        batch, height, width, channels = sizes
        shapes = (
            (batch, height * width, channels), (channels, size, size), (channels,),
            (batch, height * width, channels),
        )  # fmt: skip
        return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

    def run(impl: str, grid: tuple[int, ...]) -> Function:
        def function(tokens: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            return token_conv2d(
                tokens, weight, bias, grid=(grid[0], grid[1]), residual=residual, impl=impl
            )

        return function

    def library(grid: tuple[int, ...]) -> Function:
        """PyTorch's convolution in the dtype of the tokens, channels last: cuDNN on a GPU."""

        def function(tokens: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            image = tokens.transpose(1, 2).unflatten(2, grid)
            kernel = weight[:, None].contiguous(memory_format=torch.channels_last)
            out = F.conv2d(image, kernel, bias, padding=size // 2, groups=weight.shape[0])
            return out.flatten(2).transpose(1, 2) + residual

        return function

    return Operation(
        cases={
            "tiny": (2, 9, 11, 32),  # (B, h, w, C)
            "deit_tiny": (256, 14, 14, 192),
            "swin_stage1": (64, 56, 56, 96),
            "lit_xl_256": (64, 16, 16, 1152),
            "lit_xl_1024": (16, 64, 64, 1152),
        },
        inputs=inputs,
        functions=lambda sizes: {
            "lintra": run("auto", sizes[1:3]),
            "library": library(sizes[1:3]),
            "eager": run("reference", sizes[1:3]),
            "compiled": torch.compile(run("reference", sizes[1:3]), dynamic=False),
        },
        reference=lambda sizes: run("reference", sizes[1:3]),
        moved=lambda sizes: 3 * sizes[0] * sizes[1] * sizes[2] * sizes[3],
    )


OPERATIONS: dict[str, Operation] = {
    "linear_attention": _attention("relu", "ratio"),
    "linear_attention_covariance": _attention("identity", "covariance"),
    "token_conv2d_5x5": _convolution(5),
    "token_conv2d_3x3": _convolution(3),
}


def gradients(function: Function, inputs: Iterable[Tensor], seed: int = 0) -> list[Tensor]:
    """Output and gradients of all inputs, for one random gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    d_out = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def first_error(operation: Operation, device: str, dtype: torch.dtype) -> str | None:
    """What is wrong with lintra's results on the smallest case, None if nothing.

    err(lintra, float64) <= 2 err(reference in the same dtype, float64) + eps max|float64|.
    """
    sizes = next(iter(operation.cases.values()))
    inputs = operation.inputs(sizes, device, dtype)
    reference = operation.reference(sizes)
    got = gradients(operation.functions(sizes)["lintra"], inputs)
    plain = gradients(reference, inputs)
    # The same gradient of the output, rounded as the others saw it.
    exact = gradients(lambda *x: reference(*x).to(dtype).double(), [x.double() for x in inputs])
    for place, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        error, allowed = (a - c).abs().max(), 2 * (b - c).abs().max()
        allowed += 2 * torch.finfo(dtype).eps * c.abs().max()
        if not error <= allowed:
            return f"result {place} is off by {error:.2e}, allowed {allowed:.2e}"
    return None
