"""Normalisation and rotation: a program takes some heads of tokens and reads each once."""

import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import (
    ceil_div,
    common_vector,
    device_guard,
    empty,
    strides_in_vectors,
    unit_last,
)
from .._common.plans import Memo, Plans
from .configs import launch_of


@triton.jit
def _turn(p_x, p_weight, p_y, o_x, o_y, mask, cos0, cos1, sin0, sin1, eps,
          D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + tl.arange(0, D)).to(tl.float32)
    gain = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    x = x * gain[:, None] * weight[None, :]
    even, odd = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    y = tl.join(even * cos0 - odd * sin0, odd * cos1 + even * sin1)
    tl.store(p_y + o_y, tl.reshape(y, (ROWS, D)).to(p_y.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["tokens", "heads", "blocks", "eps", "q_sb", "q_sn", "k_sb", "k_sn"]
)  # fmt: skip
def _rotary_rms_norm_fwd_kernel(
    p_q, p_k, p_q_weight, p_k_weight, p_cos, p_sin, p_q_out, p_k_out,
    tokens, heads, blocks, eps, q_sb, q_sn, q_sh, k_sb, k_sn, k_sh,
    D: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (samples * blocks of ROWS heads of tokens, the heads of a token one after the other)."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    mask = (row < tokens * heads)[:, None]
    token = (row // heads).to(tl.int64)[:, None]
    head = (row % heads)[:, None]
    o_d = tl.arange(0, D)[None, :]
    # One table for both, and for the heads of a token.
    cos = tl.load(p_cos + token * D + o_d, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(p_sin + token * D + o_d, mask=mask, other=0.0).to(tl.float32)
    cos0, cos1 = tl.split(tl.reshape(cos, (ROWS, D // 2, 2)))
    sin0, sin1 = tl.split(tl.reshape(sin, (ROWS, D // 2, 2)))
    o_y = (batch * tokens * heads + row[:, None]) * D + o_d
    # Strides are given in multiples of VECTOR, so that the compiler knows them aligned.
    o_q = (batch * q_sb + token * q_sn + head * q_sh) * VECTOR + o_d
    _turn(p_q, p_q_weight, p_q_out, o_q, o_y, mask, cos0, cos1, sin0, sin1, eps, D, ROWS)
    o_k = (batch * k_sb + token * k_sn + head * k_sh) * VECTOR + o_d
    _turn(p_k, p_k_weight, p_k_out, o_k, o_y, mask, cos0, cos1, sin0, sin1, eps, D, ROWS)


def _plan(tensors: tuple[Tensor, ...], eps: float) -> KernelCall:
    query, key = (unit_last(x) for x in tensors[:2])
    batch, tokens, heads, head_dim = query.shape
    launch = launch_of(head_dim)
    rows = min(launch.rows, 1 << (tokens * heads - 1).bit_length())
    blocks = ceil_div(tokens * heads, rows)
    vector = common_vector(query, key)
    strides = strides_in_vectors(vector, query, key)
    constants = {"D": head_dim, "ROWS": rows, "VECTOR": vector, "num_warps": launch.warps}
    numbers = (tokens, heads, blocks, eps, *strides)
    return KernelCall(_rotary_rms_norm_fwd_kernel, (batch * blocks,), numbers, constants)


_PLANS = Plans(_plan)


def rotary_rms_norm_fwd(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor,
    cosines: Tensor, sines: Tensor, eps: float, *, memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation of `api.rotary_rms_norm` on tensors that `api` has checked."""
    query_out, key_out = empty(*query.shape, like=query), empty(*key.shape, like=key)
    if query.numel() == 0:
        return query_out, key_out
    others = (query_weight, key_weight, cosines, sines)
    call = _PLANS((query, key, *others), eps, memo=memo)
    query, key = unit_last(query), unit_last(key)
    with device_guard(query):
        call(query, key, *(x.contiguous() for x in others), query_out, key_out)
    return query_out, key_out
