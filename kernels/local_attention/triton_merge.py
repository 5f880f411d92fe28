"""Prefix queries whose keys are cut into ranges: cuDNN's attention of each, and the merge of the
results."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div
from .._common.plans import Plans
from . import configs
from .triton_blocks import load_tokens, store_tokens

# Writes the prefix queries: query, key, value, out, lse.
Prefix = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
# No part of PyTorch's public interface: without it `configs.prefix_way` takes our own kernel.
_sdpa: Any = getattr(torch, configs.CUDNN_ATTENTION, None)


@triton.jit(
    do_not_specialize=[
        "parts", "batch", "rows", "heads", "l_sb", "l_sn", "l_sh", "rows_out",
    ]
)  # fmt: skip
def _merge_kernel(
    p_part, p_part_lse, p_o, p_lse, parts, batch, rows, heads, rows_out,
    o_sb, o_sn, o_sh, l_sb, l_sn, l_sh,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """lse = log sum_p exp(lse_p), o = sum_p exp(lse_p - lse) o_p. Grid (blocks of (token, head)
    pairs, B): parts (parts * B, T, H, E) and (parts * B, T, H), results in the first T of
    `rows_out` tokens."""
    o_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < rows * heads
    row, head = (o_m // heads).to(tl.int64), (o_m % heads).to(tl.int64)
    index = tl.program_id(1).to(tl.int64)
    o_out = (index * rows_out + row) * heads + head
    top = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    for _ in range(parts):
        lse = tl.load(p_part_lse + index * l_sb + row * l_sn + head * l_sh, mask=m_m, other=0.0)
        new_top = tl.maximum(top, lse)
        change, weight = tl.exp(top - new_top), tl.exp(lse - new_top)
        total = total * change + weight
        o = load_tokens(p_part + index * o_sb, row * o_sn + head * o_sh, m_m, 1, E, BLOCK_E)
        acc = acc * change[:, None] + o.to(tl.float32) * weight[:, None]
        top = new_top
        index += batch
    total = tl.where(m_m, total, 1.0)
    store_tokens(p_o, o_out, m_m, E, acc / total[:, None], E, BLOCK_E)
    tl.store(p_lse + o_out, top + tl.log(total), mask=m_m)


def _plan_merge(tensors: tuple[Tensor, Tensor, Tensor, Tensor], heads_first: bool) -> KernelCall:
    part, part_lse, out, _ = tensors
    if heads_first:
        part, part_lse = part.transpose(1, 2), part_lse.flatten(2).transpose(1, 2)
    batch, num_tokens, heads, value_dim = out.shape
    rows, block = part.shape[1], 16
    numbers = (
        part.shape[0] // batch, batch, rows, heads, num_tokens,
        *part.stride()[:3], *part_lse.stride(),
    )  # fmt: skip
    constants = {
        "E": value_dim, "BLOCK_E": configs.channel_block(value_dim), "BLOCK": block,
        "num_warps": 4,
    }  # fmt: skip
    return KernelCall(_merge_kernel, (ceil_div(rows * heads, block), batch), numbers, constants)


_MERGES = Plans(_plan_merge)


def merge(
    part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, *, heads_first: bool = False
) -> None:
    """Writes the first T tokens of `out` (B, N, H, E) and `lse` (B, N, H), both contiguous.

    Args:
        part: (parts * B, T, H, E), or (parts * B, H, T, E) if `heads_first`.
        part_lse: (parts * B, T, H), or (parts * B, H, T) or (parts * B, H, T, 1).
    """
    tensors = (part, part_lse, out, lse)
    _MERGES(tensors, heads_first)(*tensors)


def _ranges(
    query: Tensor, key: Tensor, value: Tensor, num_prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What cuDNN takes, (parts * B, H, tokens, channels), views all of them."""
    parts = configs.sdpa_parts(query)
    q = query[:, :num_prefix].transpose(1, 2).expand(parts * query.shape[0], -1, -1, -1)
    if parts > 1:
        key, value = (x.unflatten(1, (parts, -1)).flatten(0, 1) for x in (key, value))
    return q, key.transpose(1, 2), value.transpose(1, 2)


def plan_prefix_sdpa(inputs: tuple[Tensor, ...], num_prefix: int, scale: float) -> Prefix:
    """Dense attention of the prefix queries by cuDNN, ranges of keys as a batch."""
    views = [(x.shape, x.stride()) for x in _ranges(*inputs[:3], num_prefix)]

    def fill(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
        # Every view in one step.
        q, k, v = (x.as_strided(*view) for x, view in zip((query, key, value), views, strict=True))
        part, part_lse, *_ = _sdpa(q, k, v, None, True, scale=scale)
        merge(part, part_lse, out, lse, heads_first=True)

    return fill
