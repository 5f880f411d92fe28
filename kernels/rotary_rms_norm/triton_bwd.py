"""Gradients of normalisation and rotation: one pass over queries and keys.

A program takes a run of heads of tokens and leaves its sums for the weights, of which there are as
many as programs, so that their gradients have the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.kernel_call import KernelCall
from .._common.launch import (
    ceil_div,
    common_vector,
    device_guard,
    empty,
    multiprocessors,
    strides_in_vectors,
    unit_last,
)
from .._common.plans import Plans
from .configs import PROGRAMS, launch_of


@triton.jit
def _turn_back(p_d, p_x, weight, p_dx, o_x, o_y, mask, cos0, cos1, sin0, sin1, eps,
               D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Stores dx = r (w dn - n mean(w dn n)), n = r x; gives dn n, each row's part of dw."""
    d = tl.load(p_d + o_y, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
    gain = (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps))[:, None]
    gain = tl.where(mask, gain, 0.0)  # infinite where there is no token, if eps is 0
    x = x * gain
    even, odd = tl.split(tl.reshape(d, (ROWS, D // 2, 2)))
    d = tl.join(even * cos0 + odd * sin1, odd * cos1 - even * sin0)
    d = tl.reshape(d, (ROWS, D))
    weighted = d * weight[None, :]
    dx = gain * (weighted - x * (tl.sum(weighted * x, 1) / D)[:, None])
    tl.store(p_dx + o_y, dx.to(p_dx.dtype.element_ty), mask=mask)
    return d * x


@triton.jit(
    do_not_specialize=["rows", "share", "tokens", "heads", "eps", "q_sb", "q_sn", "k_sb", "k_sn"]
)  # fmt: skip
def _rotary_rms_norm_bwd_kernel(
    p_dq_out, p_dk_out, p_q, p_k, p_q_weight, p_k_weight, p_cos, p_sin, p_dq, p_dk, p_sums,
    rows, share, tokens, heads, eps, q_sb, q_sn, q_sh, k_sb, k_sn, k_sh,
    D: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid (runs of `share` heads of tokens, of all samples one after the other)."""
    o_d = tl.arange(0, D)[None, :]
    q_weight = tl.load(p_q_weight + tl.arange(0, D)).to(tl.float32)
    k_weight = tl.load(p_k_weight + tl.arange(0, D)).to(tl.float32)
    q_sum = tl.zeros((ROWS, D), tl.float32)
    k_sum = tl.zeros((ROWS, D), tl.float32)
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < last)[:, None]
        head = (row % heads)[:, None]
        token = (row // heads % tokens)[:, None]
        batch = (row // heads // tokens)[:, None]
        cos = tl.load(p_cos + token * D + o_d, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(p_sin + token * D + o_d, mask=mask, other=0.0).to(tl.float32)
        cos0, cos1 = tl.split(tl.reshape(cos, (ROWS, D // 2, 2)))
        sin0, sin1 = tl.split(tl.reshape(sin, (ROWS, D // 2, 2)))
        o_y = row[:, None] * D + o_d
        o_q = (batch * q_sb + token * q_sn + head * q_sh) * VECTOR + o_d
        q_sum += _turn_back(
            p_dq_out, p_q, q_weight, p_dq, o_q, o_y, mask, cos0, cos1, sin0, sin1, eps, D, ROWS
        )
        o_k = (batch * k_sb + token * k_sn + head * k_sh) * VECTOR + o_d
        k_sum += _turn_back(
            p_dk_out, p_k, k_weight, p_dk, o_k, o_y, mask, cos0, cos1, sin0, sin1, eps, D, ROWS
        )
    p_sums += tl.program_id(0) * D + tl.arange(0, D)
    tl.store(p_sums, tl.sum(q_sum, 0))
    tl.store(p_sums + tl.num_programs(0) * D, tl.sum(k_sum, 0))


def _plan(tensors: tuple[Tensor, ...], eps: float) -> tuple[int, KernelCall]:
    """The number of programs, and the launch."""
    query, key = (unit_last(x) for x in tensors[:2])
    batch, tokens, heads, head_dim = query.shape
    launch = launch_of(head_dim)
    count = batch * tokens * heads
    rows = min(launch.rows, 1 << (tokens * heads - 1).bit_length())
    steps = ceil_div(count, rows)
    share = ceil_div(steps, min(steps, PROGRAMS * multiprocessors(query))) * rows
    programs = ceil_div(count, share)
    vector = common_vector(query, key)
    numbers = (count, share, tokens, heads, eps, *strides_in_vectors(vector, query, key))
    constants = {"D": head_dim, "ROWS": rows, "VECTOR": vector, "num_warps": launch.warps}
    return programs, KernelCall(_rotary_rms_norm_bwd_kernel, (programs,), numbers, constants)


_PLANS = Plans(_plan)


def rotary_rms_norm_bwd(
    d_query_out: Tensor, d_key_out: Tensor, query: Tensor, key: Tensor,
    query_weight: Tensor, key_weight: Tensor, cosines: Tensor, sines: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query and key, and those of their weights, ``(2, D)`` in float32."""
    d_query, d_key = empty(*query.shape, like=query), empty(*key.shape, like=key)
    if query.numel() == 0:
        return d_query, d_key, query.new_zeros(2, query.shape[3], dtype=torch.float32)
    others = (query_weight, key_weight, cosines, sines)
    programs, call = _PLANS((query, key, *others), eps)
    sums = empty(2, programs, query.shape[3], like=query, dtype=torch.float32)
    with device_guard(query):
        call(
            d_query_out.contiguous(), d_key_out.contiguous(), unit_last(query), unit_last(key),
            *(x.contiguous() for x in others), d_query, d_key, sums,
        )  # fmt: skip
    return d_query, d_key, sums.sum(1)
