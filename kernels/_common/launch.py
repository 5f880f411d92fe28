"""What the launchers of Triton kernels share: devices, strides, memory; imports no triton."""

import importlib.util
import math
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

# Read once, as triton itself decides at the definition of a kernel.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INSTALLED = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST = 80


def why_no_kernel(tensor: Tensor) -> str | None:
    """The reason why no Triton kernel at all can take `tensor`, None if one may."""
    if not _INSTALLED:
        return "triton is not installed"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"its kernels take float16, bfloat16 and float32, got {tensor.dtype}"
    kind = tensor.device.type
    if kind == "meta" or (kind == "cpu" and _INTERPRETED):
        return None
    if kind != "cuda":
        return f"its kernels need a CUDA device, got {kind} (TRITON_INTERPRET=1 runs them on cpu)"
    # Not while tracing: torch.compile cannot ask a device.
    if not torch.compiler.is_compiling() and is_too_old(tensor):
        return f"its kernels need compute capability {_OLDEST / 10} or newer"
    return None


def is_too_old(tensor: Tensor) -> bool:
    """Whether the device of `tensor` is a GPU for which no kernel compiles."""
    return tensor.is_cuda and architecture(tensor.get_device()) < _OLDEST


def takes_kernel(impl: str, tensor: Tensor, reason: str | None) -> bool:
    """Whether a call goes to the kernel: `auto` does so on CUDA only, the interpreter is slow."""
    return reason is None and (impl == "triton" or (impl == "auto" and tensor.is_cuda))


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a kernel to fill; one place, so that a test can poison it."""
    # PyTorch parses sizes one by one in two thirds of the time that it takes for a tuple.
    if dtype is not None:
        return torch.empty(*shape, dtype=dtype, device=like.device)
    return like.new_empty(*shape)


def ceil_div(number: int, divisor: int) -> int:
    """`triton.cdiv` in plain Python: Triton's own takes microseconds to call on the host."""
    return -(-number // divisor)


def unit_last(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels lie side by side, as in any view of a projection."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def _outer_strides(tensor: Tensor) -> list[int]:
    # The stride of a dimension of size 1 is arbitrary and would only spoil the common divisor.
    pairs = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return [stride if size > 1 else 0 for size, stride in pairs]


def common_vector(*tensors: Tensor) -> int:
    """Largest power of two, at most 16, that divides every outer stride, in elements.

    Kernels take strides divided by it and multiply by it as a constant: the compiler then sees
    that rows are aligned, which it needs for wide loads when head channels are no multiple of 16.
    """
    return math.gcd(16, *(stride for tensor in tensors for stride in _outer_strides(tensor)))


def strides_in_vectors(vector: int, *tensors: Tensor) -> list[int]:
    """Outer strides of all `tensors`, one after the other, divided by `vector`."""
    return [stride // vector for tensor in tensors for stride in _outer_strides(tensor)]


_HERE: AbstractContextManager[None] = nullcontext()


def device_guard(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the device of `tensor` the current one: Triton launches there, whatever the tensors."""
    index = tensor.get_device()
    if index < 0 or index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(index)


@cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """Of the device of `tensor`; those of an H100 where there is no GPU (interpreter)."""
    return _multiprocessors(tensor.get_device()) if tensor.is_cuda else 132


@cache
def architecture(device_index: int) -> int:
    """Compute capability as one number, 90 for Hopper; 0 where there is no GPU."""
    if device_index < 0:
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@cache
def knows_gluon() -> bool:
    """Whether this triton is one that the kernels in Gluon, which still changes, were made for."""
    try:
        major, minor = (int(x) for x in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return False
    return (3, 6) <= (major, minor) <= (3, 8)


def aligned(*tensors: Tensor) -> bool:
    """Their memory begins at multiples of 16 bytes, as the copy engine wants it; no part of a
    layout, so that a plan made for one tensor does not know it of the next."""
    return not any(x.data_ptr() % 16 for x in tensors)


def copy_engine_takes(tensor: Tensor) -> bool:
    """Its addresses and strides are multiples of 16 bytes."""
    return aligned(tensor) and copy_engine_takes_strides(tensor)


def copy_engine_takes_strides(tensor: Tensor) -> bool:
    """As much of it as follows from the layout."""
    strides = [s for n, s in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if n > 1]
    return all(s > 0 and s * tensor.element_size() % 16 == 0 for s in strides)
