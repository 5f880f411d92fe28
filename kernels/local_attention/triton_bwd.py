"""Backward kernels of local attention and their launcher; no atomics, so the same bits each time.

With P = exp(S - lse): dV = P^T dO, dS = P * (dO V^T - delta), dQ = dS K, dK = dS^T Q, where
delta = rowsum(dO * O) - dlse. One kernel owns queries and one owns keys; both compute P again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.launch import (
    aligned,
    ceil_div,
    common_vector,
    copy_engine_takes,
    device_guard,
    empty,
    strides_in_vectors,
    unit_last,
)
from . import configs
from .triton_blocks import (
    count_tiles,
    dot,
    far_outside,
    in_disc,
    load_tokens,
    next_tile,
    own_tokens,
    places,
    store_tokens,
    tile_columns,
    tile_rows,
)
from .triton_fwd import score_factors


@triton.jit
def _add_dq(q, do, k, v, keep, lse, delta, dq, factor):
    """dQ += dS K of one tile of keys, without the scale."""
    weights = tl.exp2(dot(q, tl.trans(k)) * factor - lse[:, None])
    weights = tl.where(keep, weights, 0.0)
    d_scores = weights * (dot(do, tl.trans(v)) - delta[:, None])
    return dq + dot(d_scores.to(k.dtype), k)


@triton.jit
def _add_dq_dense(
    q, do, p_k, p_v, k_sn, v_sn, start, stop, lse, delta, dq, factor,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mask = rows < stop
        k = load_tokens(p_k, rows, mask, k_sn, D, BLOCK_D)
        v = load_tokens(p_v, rows, mask, v_sn, E, BLOCK_E)
        dq = _add_dq(q, do, k, v, mask[None, :], lse, delta, dq, factor)
    return dq


@triton.jit(
    do_not_specialize=[
        "heads", "height", "width", "num_prefix", "num_extra", "limit", "share", "programs",
        "q_sb", "k_sb", "v_sb", "ek_sb", "ev_sb", "o_sb", "do_sb", "dq_sb",
        "l_sb", "l_sn", "l_sh", "dl_sb", "dl_sn", "dl_sh", "sign", "factor", "scale",
    ]
)  # fmt: skip
def _local_attention_bwd_dq_kernel(
    p_q, p_k, p_v, p_ek, p_ev, p_o, p_do, p_dq, p_lse, p_dlse, p_delta, sign, factor, scale,
    heads, height, width, num_prefix, num_extra, limit, share, programs,
    q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, ek_sb, ek_sn, ek_sh, ev_sb, ev_sn, ev_sh,
    o_sb, o_sn, o_sh, do_sb, do_sn, do_sh, dq_sb, dq_sn, dq_sh,
    l_sb, l_sn, l_sh, dl_sb, dl_sn, dl_sh,
    IMAGE: tl.constexpr, VECTOR: tl.constexpr,
    OWN_Y: tl.constexpr, OWN_X: tl.constexpr, OTHER_Y: tl.constexpr, OTHER_X: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dq = scale sum_j dS_ij k_j. Grid as in the forward kernel; also writes delta."""
    BLOCK: tl.constexpr = OTHER_Y * OTHER_X
    sequence = tl.program_id(0) // programs
    batch = (sequence // heads).to(tl.int64)
    head = (sequence % heads).to(tl.int64)
    p_k += (batch * k_sb + head * k_sh) * VECTOR
    p_v += (batch * v_sb + head * v_sh) * VECTOR
    k_sn = tl.cast(k_sn, tl.int64) * VECTOR
    v_sn = tl.cast(v_sn, tl.int64) * VECTOR
    rows, mask, y, x = own_tokens(
        tl.program_id(0) % programs, programs, num_prefix, height, width, IMAGE, OWN_Y, OWN_X
    )
    q = load_tokens(
        p_q + (batch * q_sb + head * q_sh) * VECTOR, rows, mask,
        tl.cast(q_sn, tl.int64) * VECTOR, D, BLOCK_D,
    )  # fmt: skip
    q = (q * sign).to(q.dtype)
    do = load_tokens(
        p_do + (batch * do_sb + head * do_sh) * VECTOR, rows, mask,
        tl.cast(do_sn, tl.int64) * VECTOR, E, BLOCK_E,
    )  # fmt: skip
    o = load_tokens(
        p_o + (batch * o_sb + head * o_sh) * VECTOR, rows, mask,
        tl.cast(o_sn, tl.int64) * VECTOR, E, BLOCK_E,
    )  # fmt: skip
    o_lse = batch * l_sb + rows.to(tl.int64) * l_sn + head * l_sh
    o_dlse = batch * dl_sb + rows.to(tl.int64) * dl_sn + head * dl_sh
    lse = tl.load(p_lse + o_lse, mask=mask, other=0.0) * 1.4426950408889634
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    delta -= tl.load(p_dlse + o_dlse, mask=mask, other=0.0)
    tl.store(p_delta + o_lse, delta, mask=mask)
    dq = tl.zeros((OWN_Y * OWN_X, BLOCK_D), tl.float32)
    if IMAGE:
        dq = _add_dq_dense(
            q, do, p_k, p_v, k_sn, v_sn, 0, num_prefix, lse, delta, dq, factor,
            BLOCK, D, BLOCK_D, E, BLOCK_E,
        )  # fmt: skip
        p_ek += (batch * ek_sb + head * ek_sh) * VECTOR
        p_ev += (batch * ev_sb + head * ev_sh) * VECTOR
        dq = _add_dq_dense(
            q, do, p_ek, p_ev, tl.cast(ek_sn, tl.int64) * VECTOR, tl.cast(ev_sn, tl.int64) * VECTOR,
            0, num_extra, lse, delta, dq, factor, BLOCK, D, BLOCK_D, E, BLOCK_E,
        )  # fmt: skip
        o_own = tl.arange(0, OWN_Y * OWN_X)
        own_y, own_x = y + o_own // OWN_X, x + o_own % OWN_X
        row, last_row = tile_rows(y, height, limit, OWN_Y, OTHER_Y)
        count = count_tiles(
            row, last_row, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X
        )  # fmt: skip
        column, last = tile_columns(row, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X)
        for _ in range(count):
            key_y, key_x = places(row, column, OTHER_Y, OTHER_X)
            key_rows = num_prefix + key_y * width + key_x
            exists = (key_y < height) & (key_x < width)
            k = load_tokens(p_k, key_rows, exists, k_sn, D, BLOCK_D)
            v = load_tokens(p_v, key_rows, exists, v_sn, E, BLOCK_E)
            keep = in_disc(
                own_y[:, None], own_x[:, None],
                far_outside(key_y, height)[None, :], far_outside(key_x, width)[None, :], limit,
            )  # fmt: skip
            dq = _add_dq(q, do, k, v, keep, lse, delta, dq, factor)
            row, column, last = next_tile(
                row, column, last, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X
            )
    else:
        part = tl.program_id(1)
        stop = num_prefix + height * width
        dq = _add_dq_dense(
            q, do, p_k, p_v, k_sn, v_sn, part * share, tl.minimum((part + 1) * share, stop),
            lse, delta, dq, factor, BLOCK, D, BLOCK_D, E, BLOCK_E,
        )  # fmt: skip
        batch += part.to(tl.int64) * (tl.num_programs(0) // (heads * programs))
    p_dq += (batch * dq_sb + head * dq_sh) * VECTOR
    store_tokens(p_dq, rows, mask, tl.cast(dq_sn, tl.int64) * VECTOR, dq * scale, D, BLOCK_D)


@triton.jit
def _add_dkv(k, v, q, do, keep, lse, delta, dk, dv, factor):
    """dV += P^T dO and dK += dS^T Q of one tile of queries, scores transposed: keys are rows."""
    weights = tl.exp2(dot(k, tl.trans(q)) * factor - lse[None, :])
    weights = tl.where(keep, weights, 0.0)
    dv += dot(weights.to(do.dtype), do)
    d_scores = weights * (dot(v, tl.trans(do)) - delta[None, :])
    dk += dot(d_scores.to(q.dtype), q)
    return dk, dv


@triton.jit
def _load_sums(p_lse, p_delta, rows, mask, l_sn):
    o_lse = rows.to(tl.int64) * l_sn
    lse = tl.load(p_lse + o_lse, mask=mask, other=0.0) * 1.4426950408889634
    return lse, tl.load(p_delta + o_lse, mask=mask, other=0.0)


@triton.jit
def _add_dkv_dense(
    k, v, p_q, p_do, p_lse, p_delta, q_sn, do_sn, l_sn, start, stop, dk, dv, factor,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mask = rows < stop
        q = load_tokens(p_q, rows, mask, q_sn, D, BLOCK_D)
        do = load_tokens(p_do, rows, mask, do_sn, E, BLOCK_E)
        lse, delta = _load_sums(p_lse, p_delta, rows, mask, l_sn)
        dk, dv = _add_dkv(k, v, q, do, mask[None, :], lse, delta, dk, dv, factor)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "heads", "height", "width", "num_prefix", "num_keys", "first_query", "limit", "share",
        "programs", "q_sb", "k_sb", "v_sb", "do_sb", "dk_sb", "dv_sb", "l_sb", "l_sn", "l_sh",
        "sign", "factor", "scale",
    ]
)  # fmt: skip
def _local_attention_bwd_dkv_kernel(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_lse, p_delta, sign, factor, scale,
    heads, height, width, num_prefix, num_keys, first_query, limit, share, programs,
    q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, do_sb, do_sn, do_sh,
    dk_sb, dk_sn, dk_sh, dv_sb, dv_sn, dv_sh, l_sb, l_sn, l_sh,
    IMAGE: tl.constexpr, VECTOR: tl.constexpr,
    OWN_Y: tl.constexpr, OWN_X: tl.constexpr, OTHER_Y: tl.constexpr, OTHER_X: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dk = scale sum_i dS_ij q_i, dv = sum_i P_ij do_i. Grid (B * H * tiles, ranges): a program
    owns a tile of keys of the image, or (IMAGE false) of `num_keys` that all queries from
    `first_query` on see; of the latter a range of `share` queries, and writes a part for each."""
    BLOCK: tl.constexpr = OTHER_Y * OTHER_X
    sequence = tl.program_id(0) // programs
    batch = (sequence // heads).to(tl.int64)
    head = (sequence % heads).to(tl.int64)
    p_q += (batch * q_sb + head * q_sh) * VECTOR
    p_do += (batch * do_sb + head * do_sh) * VECTOR
    p_lse += batch * l_sb + head * l_sh
    p_delta += batch * l_sb + head * l_sh
    q_sn = tl.cast(q_sn, tl.int64) * VECTOR
    do_sn = tl.cast(do_sn, tl.int64) * VECTOR
    rows, mask, y, x = own_tokens(
        tl.program_id(0) % programs, programs, num_prefix if IMAGE else num_keys, height, width,
        IMAGE, OWN_Y, OWN_X,
    )  # fmt: skip
    k = load_tokens(
        p_k + (batch * k_sb + head * k_sh) * VECTOR, rows, mask,
        tl.cast(k_sn, tl.int64) * VECTOR, D, BLOCK_D,
    )  # fmt: skip
    k = (k * sign).to(k.dtype)
    v = load_tokens(
        p_v + (batch * v_sb + head * v_sh) * VECTOR, rows, mask,
        tl.cast(v_sn, tl.int64) * VECTOR, E, BLOCK_E,
    )  # fmt: skip
    dk = tl.zeros((OWN_Y * OWN_X, BLOCK_D), tl.float32)
    dv = tl.zeros((OWN_Y * OWN_X, BLOCK_E), tl.float32)
    if IMAGE:
        dk, dv = _add_dkv_dense(
            k, v, p_q, p_do, p_lse, p_delta, q_sn, do_sn, l_sn, 0, num_prefix, dk, dv, factor,
            BLOCK, D, BLOCK_D, E, BLOCK_E,
        )  # fmt: skip
        o_own = tl.arange(0, OWN_Y * OWN_X)
        own_y, own_x = y + o_own // OWN_X, x + o_own % OWN_X
        row, last_row = tile_rows(y, height, limit, OWN_Y, OTHER_Y)
        count = count_tiles(
            row, last_row, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X
        )  # fmt: skip
        column, last = tile_columns(row, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X)
        for _ in range(count):
            query_y, query_x = places(row, column, OTHER_Y, OTHER_X)
            query_rows = num_prefix + query_y * width + query_x
            exists = (query_y < height) & (query_x < width)
            q = load_tokens(p_q, query_rows, exists, q_sn, D, BLOCK_D)
            do = load_tokens(p_do, query_rows, exists, do_sn, E, BLOCK_E)
            lse, delta = _load_sums(p_lse, p_delta, query_rows, exists, l_sn)
            keep = in_disc(
                own_y[:, None], own_x[:, None],
                far_outside(query_y, height)[None, :], far_outside(query_x, width)[None, :], limit,
            )  # fmt: skip
            dk, dv = _add_dkv(k, v, q, do, keep, lse, delta, dk, dv, factor)
            row, column, last = next_tile(
                row, column, last, y, x, width, limit, OWN_Y, OWN_X, OTHER_Y, OTHER_X
            )
    else:
        part = tl.program_id(1)
        stop = num_prefix + height * width
        start = first_query + part * share
        dk, dv = _add_dkv_dense(
            k, v, p_q, p_do, p_lse, p_delta, q_sn, do_sn, l_sn,
            start, tl.minimum(start + share, stop), dk, dv, factor,
            BLOCK, D, BLOCK_D, E, BLOCK_E,
        )  # fmt: skip
        batch += part.to(tl.int64) * (tl.num_programs(0) // (heads * programs))
    p_dk += (batch * dk_sb + head * dk_sh) * VECTOR
    p_dv += (batch * dv_sb + head * dv_sh) * VECTOR
    store_tokens(p_dk, rows, mask, tl.cast(dk_sn, tl.int64) * VECTOR, dk * scale, D, BLOCK_D)
    store_tokens(p_dv, rows, mask, tl.cast(dv_sn, tl.int64) * VECTOR, dv, E, BLOCK_E)


def _parts(parts: int, batch: int, *shape: int, like: Tensor) -> Tensor:
    return empty(parts * batch, *shape, like=like, dtype=torch.float32)


def _sum_parts(parts: int, part: Tensor, out: Tensor) -> None:
    # PyTorch sums whole dimensions in a fixed order.
    out.copy_(part.unflatten(0, (parts, -1)).sum(0))


class _Backward:
    """The launches, around what they share; tensors are as the operator's."""

    def __init__(
        self, inputs: list[Tensor], results: list[Tensor],
        grid: tuple[int, int], num_prefix: int, limit: int, scale: float,
    ) -> None:  # fmt: skip
        self.inputs = inputs
        self.out, self.lse, self.d_out, self.d_lse = results
        self.delta = torch.empty_like(self.lse)
        self.grid, self.num_prefix, self.limit = grid, num_prefix, limit
        sign, factor = score_factors(scale)
        self.numbers = (sign, factor, scale)
        query, _, value = inputs[:3]
        self.batch, self.num_tokens, self.heads, self.head_dim = query.shape
        self.value_dim = value.shape[3]
        self.width = max(self.head_dim, self.value_dim)

    def fill(self, grads: list[Tensor]) -> None:
        """Fills the gradients of the five inputs."""
        _, key, value, extra_key, extra_value = self.inputs
        grad_query, grad_key, grad_value, grad_extra_key, grad_extra_value = grads
        self.queries(grad_query, image=True)
        if self.num_prefix:
            self.queries(grad_query, image=False)
        self.keys(key, value, grad_key, grad_value, 0, image=True)
        if self.num_prefix:
            prefix = (x[:, : self.num_prefix] for x in (key, value, grad_key, grad_value))
            self.keys(*prefix, 0, image=False)
        if extra_key.shape[1]:
            extra = (extra_key, extra_value, grad_extra_key, grad_extra_value)
            self.keys(*extra, self.num_prefix, image=False)

    def queries(self, grad: Tensor, *, image: bool) -> None:
        """Fills the rows of `grad` (B, N, H, D) that belong to image or prefix; writes delta."""
        query, key, value, extra_key, extra_value = self.inputs
        launch = configs.launch_of("local_bwd_dq", query, self.width)
        programs, parts, share, part = launch.own_tiles(*self.grid), 1, 0, grad
        if not image:
            programs = ceil_div(self.num_prefix, launch.own_size)
            parts, share = configs.parts_of(
                self.num_tokens, launch.other_size, self.batch * self.heads * programs, query
            )
            if parts > 1:
                part = _parts(
                    parts, self.batch, self.num_prefix, self.heads, self.head_dim, like=query
                )
        tensors = (query, key, value, extra_key, extra_value, self.out, self.d_out, part)
        vector = common_vector(*tensors)
        _local_attention_bwd_dq_kernel[(self.batch * self.heads * programs, parts)](
            *tensors, self.lse, self.d_lse, self.delta, *self.numbers,
            self.heads, *self.grid, self.num_prefix, extra_key.shape[1], self.limit, share,
            programs, *strides_in_vectors(vector, *tensors), *self.lse.stride(),
            *self.d_lse.stride(),
            IMAGE=image, VECTOR=vector, **launch.blocks(self.head_dim, self.value_dim),
        )  # fmt: skip
        if parts > 1:
            _sum_parts(parts, part, grad[:, : self.num_prefix])

    def keys(
        self, key: Tensor, value: Tensor, grad_key: Tensor, grad_value: Tensor, first_query: int,
        *, image: bool,
    ) -> None:  # fmt: skip
        """Fills the gradients of image keys, or of all of `key` and `value`, seen by the queries
        from `first_query` on."""
        query = self.inputs[0]
        num_keys = key.shape[1]
        launch = configs.launch_of("local_bwd_dkv", query, self.width)
        programs, parts, share = launch.own_tiles(*self.grid), 1, 0
        grads = (grad_key, grad_value)
        if not image:
            programs = ceil_div(num_keys, launch.own_size)
            parts, share = configs.parts_of(
                self.num_tokens - first_query, launch.other_size,
                self.batch * self.heads * programs, query,
            )  # fmt: skip
            if parts > 1:
                grads = tuple(
                    _parts(parts, self.batch, num_keys, self.heads, channels, like=query)
                    for channels in (self.head_dim, self.value_dim)
                )
        tensors = (query, key, value, self.d_out, *grads)
        vector = common_vector(*tensors)
        _local_attention_bwd_dkv_kernel[(self.batch * self.heads * programs, parts)](
            *tensors, self.lse, self.delta, *self.numbers,
            self.heads, *self.grid, self.num_prefix, num_keys, first_query, self.limit, share,
            programs, *strides_in_vectors(vector, *tensors), *self.lse.stride(),
            IMAGE=image, VECTOR=vector, **launch.blocks(self.head_dim, self.value_dim),
        )  # fmt: skip
        if parts > 1:
            for part, out in zip(grads, (grad_key, grad_value), strict=True):
                _sum_parts(parts, part, out)


def local_attention_bwd(
    query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor, extra_value: Tensor,
    out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor,
    height: int, width: int, num_prefix: int, radius: float, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the five inputs of `local_attention_fwd`."""
    inputs = [query, key, value, extra_key, extra_value]
    grads = [empty(*x.shape, like=x) for x in inputs]
    if lse.numel() == 0:
        return tuple(grads)
    inputs = [unit_last(x) for x in inputs]
    limit = configs.disc_limit(height, width, radius)
    with device_guard(query):
        if configs.way_of("bwd", inputs, scale) == "hopper" and aligned(*inputs):
            from .hopper_grads import HopperBackward, fill_gradients  # as in `triton_fwd.py`

            d_out = d_out if copy_engine_takes(d_out) else d_out.contiguous()
            factor = score_factors(scale)[1]
            hopper = HopperBackward(
                tuple(inputs), d_out, height, width, num_prefix, limit, factor, scale
            )
            fill_gradients(hopper, out, lse, d_lse, tuple(grads))
        else:
            results = [out, lse, unit_last(d_out), d_lse]
            run = _Backward(inputs, results, (height, width), num_prefix, limit, scale)
            run.fill(grads)
    return tuple(grads)
