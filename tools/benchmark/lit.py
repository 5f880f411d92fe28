"""Cases of LiT against DiT, sizes S to XL with random weights, at 256 to 2048 pixels of latents."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from . import ada_layer_norm, linear_attention, token_conv
from .case import Case, Peer, Run
from .models import Mode, forward_of, step_of

# (blocks, width, heads of DiT, heads of LiT)
SIZES: dict[str, tuple[int, int, int, int]] = {
    "S": (12, 384, 6, 2),
    "B": (12, 768, 12, 3),
    "L": (24, 1024, 16, 4),
    "XL": (28, 1152, 16, 4),
}
TINY_SIZE = {"tiny": (2, 16, 2, 1)}
# pixels -> batch: 8192 or 16384 tokens
BATCHES = {256: 32, 512: 8, 1024: 4, 2048: 1}
TINY_BATCHES = {64: 2}
# (size, pixels) -> lowest speed-up of the forward over DiT
SPEEDUPS = {("XL", 256): 1.0, ("XL", 512): 1.1, ("XL", 1024): 1.5, ("XL", 2048): 4.0}
PEER = "dit"
# Pixels of a token's side: eight of the autoencoder times the patch of two.
TOKEN = 16
# The check in float64 is as strict with few images, and quick.
_CHECKED_BATCH = 2
# Modes whose graphs must be of whole models: PyTorch takes every call of one for a new step, in
# which the results of the calls before, as the block before, are overwritten.
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def _model(linear: bool, size: tuple[int, int, int, int], side: int, mode: Mode) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    from lintra.diffusion.models.transformer_lit import LiTTransformer2DModel

    blocks, width, heads, linear_heads = size
    config: dict[str, Any] = {
        "num_layers": blocks,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "sample_size": side // 8,
        "out_channels": 8,
    }
    # On the device at once: half a billion random numbers take a CPU ten seconds.
    with torch.device(mode.device):
        if linear:
            return LiTTransformer2DModel(**config, num_linear_heads=linear_heads)
        return DiTTransformer2DModel(**config)


def _latents(
    batch: int, side: int, mode: Mode, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    kind = torch.float32 if mode.training else dtype
    latents = torch.randn(batch, 4, side // 8, side // 8, device=device, dtype=kind)
    steps = torch.randint(1000, (batch,), device=device)
    return [latents, steps, torch.randint(1000, (batch,), device=device)]


def prepare(
    make: Callable[[], nn.Module], mode: Mode, forward: Callable[..., Tensor] = forward_of
) -> Run:
    """What is timed of a model: ``forward(model, *inputs)``, or a step with it."""
    from lintra.diffusion.compilation import compile_blocks

    model = make().to(mode.device, torch.float32 if mode.training else mode.dtype)
    model.train(mode.training).requires_grad_(mode.training)
    if mode.compile_mode is not None:
        # By blocks (DiT's one by one, LiT's four to a graph in inference) for many cases: a whole
        # XL takes up to a minute to compile.
        compiles = nn.Module.compile if mode.whole else compile_blocks
        compiles(model, dynamic=False, mode=mode.compile_mode)
    call = partial(forward, model)
    return step_of(model, call, mode) if mode.training else call


def checks_of(name: str, size: tuple[int, int, int, int], side: int) -> tuple[Case, ...]:
    """The operations at the shapes at which a model calls them; these are what is checked."""
    _, width, _, heads = size
    grid, batch = side // TOKEN, _CHECKED_BATCH
    attention = (batch, grid * grid, heads, width // heads)
    return (
        linear_attention.build(attention, name),
        token_conv.build((batch, grid, grid, width, 5, 1, 0), name),
        *(ada_layer_norm.build((batch, grid * grid, width, kind), name) for kind in (0, 1, 2)),
    )


def build(name: str, size: tuple[int, int, int, int], side: int, batch: int, mode: Mode) -> Case:
    """The case of one size of LiT, e.g. ``XL``, at images of `side` pixels."""

    def entry(linear: bool) -> Peer:
        return Peer(partial(prepare, partial(_model, linear, size, side, mode), mode))

    targets = {}
    if mode.training:
        targets = {("step", f"memory of {PEER}"): 1.0}
    elif (name, side) in SPEEDUPS:
        targets = {("fwd", PEER): SPEEDUPS[name, side]}
    return Case(
        op="lit",
        group=name,
        shape=f"{side}px B{batch} {mode}",
        make=partial(_latents, batch, side, mode),
        ours=entry(True),
        checks=checks_of(name, size, side),
        peers={PEER: entry(False)},
        targets={} if mode.tiny else targets,
        directions=("step" if mode.training else "fwd",),
        images=batch,
        takes_turns=True,
    )


def mode_of(mode: Mode) -> Mode:
    """`mode` as diffusion models can run in it."""
    return replace(mode, whole=mode.whole or mode.compile_mode in _CUDA_GRAPHS)


def sides_of(
    shapes: Sequence[Sequence[int]] | None, usual: dict[int, int]
) -> list[tuple[int, int]]:
    """Pixels of a side and batch of each case: `shapes`, or `usual` where there are none.

    Raises:
        ValueError: a shape of another form.
    """
    for shape in shapes or ():
        if len(shape) != 2 or shape[0] % TOKEN or min(shape) < 1:
            raise ValueError(f"`shape` must be pixels (a multiple of 16), batch, got {shape}")
    return [(side, batch) for side, batch in shapes or usual.items()]


def cases(mode: Mode, shapes: Sequence[Sequence[int]] | None = None) -> list[Case]:
    """All sizes at all resolutions; `shapes` are (pixels, batch) instead of the usual ones.

    Raises:
        ValueError: a shape of another form.
    """
    import_module("lintra.diffusion.models.transformer_lit")  # before anything is timed
    mode, wanted = mode_of(mode), sides_of(shapes, TINY_BATCHES if mode.tiny else BATCHES)
    sizes = TINY_SIZE if mode.tiny else SIZES
    return [
        build(name, size, side, batch, mode)
        for name, size in sizes.items()
        for side, batch in wanted
    ]
