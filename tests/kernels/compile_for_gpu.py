"""Compiles the kernels of every operation for one architecture, on a machine without a GPU.

`test_compilation.py` runs it as a program: Triton must be imported without its interpreter. The
launchers get CPU tensors, and what they would launch is compiled. Ends with a traceback where the
compiler refuses a kernel, else prints how many it has compiled.
"""

import sys

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lintra.kernels._common import launch
from lintra.kernels._common.pinning import pinned
from lintra.kernels.ada_layer_norm.triton_bwd import (
    ada_layer_norm_bwd,
    gated_ada_layer_norm_bwd,
    gated_add_bwd,
)
from lintra.kernels.ada_layer_norm.triton_fwd import (
    ada_layer_norm_fwd,
    gated_ada_layer_norm_fwd,
    gated_add_fwd,
)
from lintra.kernels.grouped_mlp.triton_fwd import grouped_mlp_fwd
from lintra.kernels.layer_norm.triton_fwd import layer_norm_fwd
from lintra.kernels.linear_attention import configs as linear_configs
from lintra.kernels.linear_attention import ways as linear_ways
from lintra.kernels.linear_attention.triton_bwd import linear_attention_bwd
from lintra.kernels.linear_attention.triton_fwd import linear_attention_fwd
from lintra.kernels.local_attention import configs as local_configs
from lintra.kernels.local_attention.triton_bwd import local_attention_bwd
from lintra.kernels.local_attention.triton_fwd import local_attention_fwd
from lintra.kernels.rotary_rms_norm.triton_bwd import rotary_rms_norm_bwd
from lintra.kernels.rotary_rms_norm.triton_fwd import rotary_rms_norm_fwd
from lintra.kernels.stacked_linear.table import TensorTable
from lintra.kernels.stacked_linear.triton_fwd import stacked_linear_fwd
from lintra.kernels.token_conv.triton_bwd import token_conv2d_bwd_weight
from lintra.kernels.token_conv.triton_fwd import token_conv2d_fwd

ARCHITECTURE = int(sys.argv[1])
SHARED_MEMORY = {90: 227 * 1024}  # bytes that a program may have
LINEAR = (("relu", "ratio"), ("identity", "covariance"))
compiled = []


class NoDevice:
    """What Triton asks of a driver to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compiles(kernel: JITFunction, grid: tuple[int, ...]):
    def launch_nothing(*arguments, **options):
        binary = kernel.warmup(*arguments, grid=grid, **options)
        assert binary.metadata.shared <= SHARED_MEMORY[ARCHITECTURE], kernel.__name__
        compiled.append(kernel.__name__)

    return launch_nothing


def heads_outside(tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(B, N, H, D) whose tokens follow each other: the stride of 16 channels is one vector."""
    return torch.empty(2, 2, tokens, dim, dtype=dtype).transpose(1, 2)


def linear(dim: int, dtype: torch.dtype, *members: tuple[str, str]) -> None:
    query, key, value, out = (heads_outside(68, dim, dtype) for _ in range(4))
    for options in members:
        linear_attention_fwd(query, key, value, *options, 1.0, 1e-6)
        linear_attention_bwd(out, query, key, value, *options, 1.0, 1e-6)


def local(dim: int, dtype: torch.dtype) -> None:
    height, width, num_prefix = 9, 7, 5
    query, key, value, out = (heads_outside(68, dim, dtype) for _ in range(4))
    place = (height, width, num_prefix, 3.0, 0.25)
    tensors = (query, key, value, key[:, :16], value[:, :16])
    with pinned(local_prefix_way="general"):  # else cuDNN's, which is not compiled here
        _, lse = local_attention_fwd(*tensors, *place)
        local_attention_bwd(*tensors, out, lse, out, torch.empty_like(lse), *place)


def convolution(channels: int, dtype: torch.dtype) -> None:
    tokens = torch.empty(3, 6, channels, dtype=dtype)
    for size, grid in ((3, (1, 6)), (5, (2, 3))):
        token_conv2d_fwd(tokens, torch.empty(channels, size, size), None, tokens, 0, *grid)
        token_conv2d_bwd_weight(tokens, tokens, channels, size, False, 0, *grid)


def mlp(width: int, dtype: torch.dtype) -> None:
    x, weight1, weight2 = (torch.empty(n, 2 * width, dtype=dtype) for n in (5, width, 9 * width))
    weights = [w.view(-1, width, 1) for w in (weight1, weight2)]
    grouped_mlp_fwd(x, weights[0], x.new_empty(2 * width), weights[1], x.new_empty(18 * width), 2)


def adaptive(channels: int, dtype: torch.dtype) -> None:
    x, update = torch.empty(2, 2, 9, channels, dtype=dtype)
    gate, scale, shift = torch.empty(2, 3 * channels, dtype=dtype).chunk(3, dim=1)
    ada_layer_norm_fwd(x, scale, shift, 1e-6)
    gated_ada_layer_norm_fwd(x, update, gate, scale, shift, 1e-6)
    gated_add_fwd(x, update, gate)
    ada_layer_norm_bwd(update, x, scale, 1e-6)
    gated_ada_layer_norm_bwd(update, update, x, update, gate, scale, 1e-6)
    gated_add_bwd(x, update, gate)


def stacked(batch: int, width: int, dtype: torch.dtype, of_tables: torch.dtype) -> None:
    x, labels = torch.empty(batch, width, dtype=dtype), torch.zeros(batch, dtype=torch.int64)
    tables = [
        TensorTable("made", [torch.empty(shape, dtype=of_tables)] * 2)
        for shape in ((72, width), (72,), (11, 72))
    ]
    stacked_linear_fwd(x, *tables, labels, True)
    stacked_linear_fwd(torch.stack([x, x]), *tables, torch.stack([labels, labels]), True)
    stacked_linear_fwd(torch.stack([x, x]), *tables[:2], None, None, False)


def rotary(dim: int, dtype: torch.dtype) -> None:
    query, key = (heads_outside(68, dim, dtype) for _ in range(2))
    weights, tables = torch.empty(2, dim, dtype=dtype), torch.empty(2, 68, dim)
    rotary_rms_norm_fwd(query, key, *weights, *tables, 1e-6)
    rotary_rms_norm_bwd(query, key, query, key, *weights, *tables, 1e-6)


driver.set_active(NoDevice())
JITFunction.__getitem__ = compiles
for module in (launch, linear_configs, linear_ways, local_configs):
    module.architecture = lambda index: ARCHITECTURE
for dtype in (torch.float32, torch.bfloat16):
    convolution(8, dtype)
    adaptive(1152, dtype)
    layer_norm_fwd(torch.empty(4, 48, dtype=dtype), *torch.empty(2, 48, dtype=dtype), 1e-6)
for dim, dtype in ((16, torch.float32), (64, torch.bfloat16)):
    linear(dim, dtype, *LINEAR)
    local(dim, dtype)
    mlp(dim, dtype)
    rotary(2 * dim, dtype)
    for of_tables in {dtype, torch.float32}:
        stacked(dim, 8 * dim, dtype, of_tables)  # at 64 samples the most memory
with pinned(fwd_way="wide", bwd_way="wide"):
    linear(288, torch.bfloat16, *LINEAR)
    linear(320, torch.bfloat16, LINEAR[0])  # the most memory
for dim in (64, 288, 320):  # one part of channels, and the most memory of each launch
    with pinned(fwd_way="quadratic", bwd_way="quadratic"):
        linear(dim, torch.bfloat16, ("relu", "ratio"))
print(f"{len(compiled)} kernels for {ARCHITECTURE}: {', '.join(sorted(set(compiled)))}")
