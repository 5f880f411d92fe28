"""Layer normalisation of narrow tokens: several tokens a program, each read once."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import ceil_div, device_guard, empty
from .._common.plans import Memo, Plans

# Elements a program holds, of which each of its threads has sixteen.
_ELEMENTS = 2048
_WARPS = 4


@triton.jit(do_not_specialize=["rows", "eps"])
def _layer_norm_fwd_kernel(
    p_x, p_weight, p_bias, p_o, rows, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """o = (x - mean) / sqrt(var + eps) * w + b of BLOCK rows of C channels. Grid (blocks)."""
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    mask = (o_r < rows)[:, None] & m_c[None, :]
    o_x = o_r.to(tl.int64)[:, None] * C + o_c[None, :]
    x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    centred = tl.where(m_c[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / C
    weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    out = centred * (1.0 / tl.sqrt(variance + eps))[:, None] * weight[None, :] + bias[None, :]
    tl.store(p_o + o_x, out.to(p_o.dtype.element_ty), mask=mask)


class _Plan(NamedTuple):
    """The launch, and whether it needs copies of its tensors."""

    call: KernelCall
    copied: bool


def _plan(tensors: tuple[Tensor, Tensor, Tensor], eps: float) -> _Plan:
    x, _, _ = tensors
    channels = x.shape[-1]
    rows = x.numel() // channels
    block_c = 1 << (channels - 1).bit_length()
    block = max(1, _ELEMENTS // block_c)
    constants = {"C": channels, "BLOCK_C": block_c, "BLOCK": block, "num_warps": _WARPS}
    call = KernelCall(_layer_norm_fwd_kernel, (ceil_div(rows, block),), (rows, eps), constants)
    return _Plan(call, not all(tensor.is_contiguous() for tensor in tensors))


_PLANS = Plans(_plan)


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, memo: Memo | None = None
) -> Tensor:
    """The operation of `api.layer_norm` on tensors that `api` has checked."""
    out = empty(*x.shape, like=x)
    if x.numel() == 0:
        return out
    call, copied = _PLANS((x, weight, bias), eps, memo=memo)
    if copied:
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    with device_guard(x):
        call(x, weight, bias, out)
    return out
