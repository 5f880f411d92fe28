"""Which way linear attention runs, and which kernels serve it: the general ones in Triton's own
language, or those for Hopper."""

import torch
from torch import Tensor

from .._common.launch import architecture, copy_engine_takes, knows_gluon, multiprocessors
from .._common.pinning import pin_or
from . import configs

# Widest head of which one program's registers hold the forward state, by architecture, bfloat16.
_MAX_FUSED_DIM = {90: 192}

# (over, up to, tokens): widths of heads whose quadratic order is taken for up to so many tokens, by
# kernel; where it was measured to be faster: bfloat16, H100, batch 64, as many queries as keys.
_QUADRATIC: dict[str, tuple[tuple[int, int, int], ...]] = {
    "hopper": ((64, 96, 256), (128, 160, 256), (160, 320, 512)),
    "general": ((256, 320, 256),),
}


def _hopper_takes(*tensors: Tensor) -> bool:
    """Whether the kernels for the copy engine and the tensor cores of Hopper take them."""
    return (
        architecture(tensors[0].get_device()) == 90
        and tensors[0].dtype == torch.bfloat16
        and all(x.shape[3] % 8 == 0 and copy_engine_takes(x) for x in tensors)
        and knows_gluon()
    )


def quadratic_kernel(query: Tensor, key: Tensor, value: Tensor) -> str:
    """hopper or general: one for the forward pass only, since gradients of the linear order were
    faster."""
    hopper = query.shape[3] == value.shape[3] and _hopper_takes(query, key, value)
    return pin_or("quadratic_kernel", "hopper" if hopper else "general")


def state_kernel(key: Tensor, value: Tensor) -> str:
    """hopper or general: which kernel sweeps over tokens for a state."""
    hopper = key.shape[3] > configs.MAX_NARROW_DIM and _hopper_takes(key, value)
    return pin_or("state_kernel", "hopper" if hopper else "general")


def _is_quadratic(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the quadratic order was measured to be faster."""
    if architecture(query.get_device()) != 90 or query.dtype != torch.bfloat16:
        return False
    # Queries count as keys do: many more of them cost the linear order half as much, and programs
    # that own keys pass them all.
    width, tokens = max(query.shape[3], value.shape[3]), max(query.shape[1], key.shape[1])
    rows = _QUADRATIC[quadratic_kernel(query, key, value)]
    return any(over < width <= up_to and tokens <= most for over, up_to, most in rows)


def way_of(name: str, query: Tensor, key: Tensor, value: Tensor, normalizer: str) -> str:
    """fused: one program a head; split: ranges of tokens around a state that a program can keep;
    wide: around one that it cannot; quadratic: no state, but no covariance, and gradients by the
    kernels for Hopper only.

    `name` is fwd or bwd.
    """
    batch, num_queries, heads, head_dim = query.shape
    tokens, width = max(num_queries, key.shape[1]), max(head_dim, value.shape[3])
    waves = batch * heads / multiprocessors(query)
    # Few heads leave processors idle, which only a short run of tokens forgives; with many tokens
    # two sweeps stream better than one program that changes from keys to queries.
    short = tokens <= 256 or (tokens <= 512 and waves >= 2.5)
    widest = configs.MAX_NARROW_DIM
    if name == "bwd" and query.element_size() == 2:
        widest = 64
    elif name == "fwd" and query.dtype == torch.bfloat16:
        widest = _MAX_FUSED_DIM.get(architecture(query.get_device()), configs.MAX_NARROW_DIM)
    around_a_state = "split" if width <= configs.MAX_NARROW_DIM else "wide"
    linear = "fused" if short and width <= widest else around_a_state
    chosen = "quadratic" if _is_quadratic(query, key, value) else linear
    way = pin_or(f"{name}_way", chosen)
    kernel = quadratic_kernel(query, key, value)
    only_linear = normalizer == "covariance" or (name == "bwd" and kernel == "general")
    return linear if way == "quadratic" and only_linear else way


def query_grad_kernel(d_out: Tensor, query: Tensor) -> str:
    """hopper or general: which kernel gives the gradient of queries of wide heads."""
    width = sum(configs.parts_of(query.shape[3], "d", "bwd_dq_hopper", query.dtype))
    fits = (
        query.shape == d_out.shape
        and 2 * width * (width + configs.ROWS_BLOCK) <= configs.SHARED_BYTES
    )
    hopper = fits and _hopper_takes(query, d_out)
    return pin_or("query_grad_kernel", "hopper" if hopper else "general")


def rows_kernel(x: Tensor, y: Tensor) -> str:
    """hopper or general: which kernel multiplies rows of tokens, x, by a state, to give y."""
    wide = max(x.shape[3], y.shape[3]) > configs.MAX_NARROW_DIM
    hopper = (
        wide and _hopper_takes(x, y) and configs.resident_columns(x.shape[3], y.shape[3], x)[1] > 0
    )
    return pin_or("rows_kernel", "hopper" if hopper else "general")
