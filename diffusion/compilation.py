"""`torch.compile` of what a transformer repeats."""

from typing import Any

from torch import nn

_BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compiles each block of a transformer in place; blocks of one kind share one compilation.

    Compiling a whole DiT-XL/2 takes a minute for 28 times the same block. Parameters, their names
    and the forward call stay as they are. diffusers' `compile_repeated_blocks` does this for models
    that list their blocks, which its own DiT and PixArt, the teachers, do not. A model that can run
    several blocks in one graph, as LiT can, has these compiled too.

    Args:
        model: a transformer of diffusers.
        options: of `torch.compile`. Modes with CUDA graphs (`reduce-overhead`, `max-autotune`) are
            for whole models, ``model.compile(mode=...)``: to PyTorch each call of a block is a new
            step, in which the results of the block before are overwritten, and it refuses them.

    Raises:
        ValueError: a model without `transformer_blocks`.
    """
    lists = [getattr(model, name, None) for name in _BLOCKS]
    found = [blocks for blocks in lists if isinstance(blocks, nn.ModuleList)]
    if not found:
        raise ValueError(f"`model` must have transformer_blocks, got a {type(model).__name__}")
    for blocks in found:
        for block in blocks:
            block.compile(**options)
    compile_runs = getattr(model, "compile_runs", None)
    if compile_runs is not None:
        compile_runs(**options)
