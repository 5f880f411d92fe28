"""Launches the backward kernels of local attention for Hopper."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .._common.launch import ceil_div, empty, multiprocessors
from . import configs
from .hopper_blocks import TILE, dense_descriptor, grid_descriptor, tiles_of
from .hopper_bwd import (
    _local_attention_bwd_dkv_hopper_kernel,
    _local_attention_bwd_dq_hopper_kernel,
)
from .triton_blocks import load_tokens

# Own tokens of an item on the grid or in a sequence: two groups of threads.
_GROUPS = 2


@triton.jit(
    do_not_specialize=[
        "sequences", "heads", "height", "width", "num_prefix", "prefix_tiles",
        "l_sb", "l_sn", "l_sh", "dl_sb", "dl_sn", "dl_sh",
    ]
)  # fmt: skip
def _local_attention_bwd_stats_kernel(
    p_o, p_do, p_lse, p_dlse, p_stats, sequences, heads, height, width, num_prefix, prefix_tiles,
    o_sb, o_sn, o_sh, do_sb, do_sn, do_sh, l_sb, l_sn, l_sh, dl_sb, dl_sn, dl_sh,
    SIDE: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta = rowsum(dO * O) - dlse in tiles, see `hopper_bwd.py`. Grid (tiles *
    B * H), all heads of a tile one after the other, since their channels lie side by side."""
    TOKENS: tl.constexpr = SIDE * SIDE
    tile, sequence = tl.program_id(0) // sequences, tl.program_id(0) % sequences
    batch = (sequence // heads).to(tl.int64)
    head = (sequence % heads).to(tl.int64)
    o_m = tl.arange(0, TOKENS)
    columns = tl.cdiv(width, SIDE)
    at = tl.maximum(tile - prefix_tiles, 0)
    y, x = at // columns * SIDE + o_m // SIDE, at % columns * SIDE + o_m % SIDE
    is_prefix = tile < prefix_tiles
    rows = tl.where(is_prefix, tile * TOKENS + o_m, num_prefix + y * width + x).to(tl.int64)
    mask = tl.where(is_prefix, rows < num_prefix, (y < height) & (x < width))
    o = load_tokens(p_o + batch * o_sb + head * o_sh, rows, mask, o_sn, E, E)
    do = load_tokens(p_do + batch * do_sb + head * do_sh, rows, mask, do_sn, E, E)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(p_lse + batch * l_sb + rows * l_sn + head * l_sh, mask=mask, other=float("inf"))
    d_lse = tl.load(p_dlse + batch * dl_sb + rows * dl_sn + head * dl_sh, mask=mask, other=0.0)
    tiles = tl.num_programs(0) // sequences
    p_own = p_stats + (sequence.to(tl.int64) * tiles + tile) * (2 * TOKENS)
    tl.store(p_own + o_m, lse * 1.4426950408889634)
    tl.store(p_own + TOKENS + o_m, delta - d_lse)


class HopperBackward:
    """The launches, around what they share; tensors are as the operator's."""

    def __init__(
        self, inputs: tuple[Tensor, ...], d_out: Tensor,
        height: int, width: int, num_prefix: int, limit: int, factor: float, scale: float,
    ) -> None:  # fmt: skip
        self.inputs, self.d_out = inputs, d_out
        self.grid, self.num_prefix, self.limit = (height, width), num_prefix, limit
        self.numbers = (factor, scale)
        query, _, value, _, _ = inputs
        self.batch, _, self.heads, self.head_dim = query.shape
        self.value_dim = value.shape[3]
        self.grid_tiles, self.grid_items = tiles_of(height, width)
        self.prefix_tiles = ceil_div(num_prefix, TILE.value)
        self.constants = {
            "D": self.head_dim, "E": self.value_dim, "num_warps": 4,
            "STAGES": configs.hopper_stages("bwd", self.head_dim, self.value_dim),
        }  # fmt: skip
        self.programs = multiprocessors(query)

    def on_grid(self, tensor: Tensor) -> TensorDescriptor:
        return grid_descriptor(tensor, self.num_prefix, *self.grid)

    def stats(self, out: Tensor, lse: Tensor, d_lse: Tensor) -> None:
        """Computes lse and delta in tiles."""
        count = self.prefix_tiles + self.grid_tiles
        sequences, width = self.batch * self.heads, 2 * TILE.value
        self.tiles = empty(sequences * count, width, like=lse)
        self.tiles_desc = TensorDescriptor(
            self.tiles, list(self.tiles.shape), [width, 1], [1, width],
            gl.NVMMASharedLayout(0, 32, 2),
        )  # fmt: skip
        _local_attention_bwd_stats_kernel[(count * sequences,)](
            out, self.d_out, lse, d_lse, self.tiles, sequences, self.heads, *self.grid,
            self.num_prefix, self.prefix_tiles, *out.stride()[:3], *self.d_out.stride()[:3],
            *lse.stride(), *d_lse.stride(), SIDE=8, E=self.value_dim, num_warps=4,
        )  # fmt: skip

    def _grid_items(self) -> tuple[int, ...]:
        """items, tiles, together, blocks, first, share, batches of a launch that owns the grid."""
        items = self.batch * self.heads * self.grid_items
        token_bytes = 2 * (self.head_dim + self.value_dim)
        together = configs.heads_together(self.heads, self.grid[1], self.limit, token_bytes)
        return items, self.grid_items, together, 1, 0, 0, self.batch

    def _dense_items(self, num_own: int, first: int) -> tuple[int, tuple[int, ...]]:
        """Parts, and the same numbers of a launch that owns `num_own` leading tokens."""
        blocks = ceil_div(num_own, _GROUPS * TILE.value)
        visited = self.prefix_tiles + self.grid_tiles - first
        count = self.batch * self.heads * blocks
        parts = configs.even_parts(count, visited, self.programs)
        share = ceil_div(visited, parts)
        parts = ceil_div(visited, share)
        return parts, (count * parts, blocks * parts, 1, blocks, first, share, self.batch)

    def queries(self, grad: Tensor, *, image: bool) -> None:
        """Fills the rows of `grad` that belong to image or prefix."""
        query, key, value, extra_key, extra_value = self.inputs
        num_extra = extra_key.shape[1] if image else 0
        dense = [dense_descriptor(x, self.num_prefix) for x in (key, value)]
        extra = [dense_descriptor(x, num_extra) for x in (extra_key, extra_value)]
        own = (query, self.d_out)
        if image:
            parts, items, part = 1, self._grid_items(), self.tiles
            own = [self.on_grid(x) for x in own]
        else:
            parts, items = self._dense_items(self.num_prefix, 0)
            own = [dense_descriptor(x, self.num_prefix) for x in own]
            shape = (parts, self.batch, self.num_prefix, self.heads, self.head_dim)
            part = empty(*shape, like=query, dtype=torch.float32)
        _local_attention_bwd_dq_hopper_kernel[(min(items[0], self.programs),)](
            *own, self.on_grid(key), self.on_grid(value), *dense, *(extra if num_extra else dense),
            self.on_grid(grad), part, self.tiles, *self.numbers,
            self.heads, *self.grid, self.num_prefix, num_extra, self.limit, *items,
            IMAGE=image, **self.constants,
        )  # fmt: skip
        if not image:
            grad[:, : self.num_prefix].copy_(part.sum(0))

    def keys(
        self, key: Tensor, value: Tensor, grad_key: Tensor, grad_value: Tensor,
        *, image: bool, first: int = 0,
    ) -> None:  # fmt: skip
        """Fills the gradients of the image keys, or of all of `key` and `value`, which the queries
        from tile `first` on see."""
        query = self.inputs[0]
        num_own = key.shape[1]
        if image:
            items, part_key, part_value = self._grid_items(), self.tiles, self.tiles
            own = [self.on_grid(x) for x in (key, value)]
            grads = [self.on_grid(x) for x in (grad_key, grad_value)]
        else:
            parts, items = self._dense_items(num_own, first)
            own = [dense_descriptor(x, num_own) for x in (key, value)]
            grads = [self.on_grid(x) for x in self.inputs[:2]]  # not written
            part_key, part_value = (
                empty(parts, self.batch, num_own, self.heads, c, like=query, dtype=torch.float32)
                for c in (self.head_dim, self.value_dim)
            )
        others = (query, self.d_out)
        _local_attention_bwd_dkv_hopper_kernel[(min(items[0], self.programs),)](
            *own, *(self.on_grid(x) for x in others),
            *(dense_descriptor(x, self.num_prefix) for x in others),
            self.tiles_desc, *grads, part_key, part_value, *self.numbers,
            self.heads, *self.grid, self.num_prefix, num_own, self.limit, *items,
            IMAGE=image, **self.constants,
        )  # fmt: skip
        if not image:
            # PyTorch sums whole dimensions in a fixed order.
            grad_key.copy_(part_key.sum(0))
            grad_value.copy_(part_value.sum(0))


def fill_gradients(
    run: HopperBackward, out: Tensor, lse: Tensor, d_lse: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """Fills the gradients of the five inputs."""
    grad_query, grad_key, grad_value, grad_extra_key, grad_extra_value = grads
    _, key, value, extra_key, extra_value = run.inputs
    run.stats(out, lse, d_lse)
    run.queries(grad_query, image=True)
    run.keys(key, value, grad_key, grad_value, image=True)
    if run.num_prefix:
        run.queries(grad_query, image=False)
        prefix = (x[:, : run.num_prefix] for x in (key, value, grad_key, grad_value))
        run.keys(*prefix, image=False)
    if extra_key.shape[1]:
        own = (extra_key, extra_value, grad_extra_key, grad_extra_value)
        run.keys(*own, image=False, first=run.prefix_tiles)
