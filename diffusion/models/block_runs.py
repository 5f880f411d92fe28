"""The blocks of a LiT one after the other, and compiled a few to a graph."""

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn

from ..untouched import is_unhooked
from .lit_block import LiTBlock
from .modulation import GatedSum, gated

# A compiled call costs the host guards and bookkeeping, which a run has once: a block took .50 ms
# by itself and .43 in a run of four (a CPU with empty launches, 2026-11-30). Longer graphs save
# little more and compile for longer.
_LONGEST = 4
# Somebody may put another one in its place, to look on.
_FORWARD = LiTBlock.forward


def _run(
    blocks: Sequence[LiTBlock],
    hidden_states: Tensor,
    time_features: Tensor,
    class_labels: Tensor | None,
    attention_kwargs: dict[str, Any],
    modulations: Sequence[Tensor | None],
) -> Tensor:
    """Blocks whose forward is all there is to them: the sum that ends one is taken by the norm that
    begins the next, one pass over the tokens and one launch less."""
    # Handed over, not held: the parts of a sum would live through the block that has added them.
    tokens: list[Tensor | GatedSum] = [hidden_states]
    del hidden_states
    for block, modulation in zip(blocks, modulations, strict=True):
        tokens.append(
            block.without_sum(
                tokens.pop(), time_features, class_labels, attention_kwargs, modulation
            )
        )
    (last,) = tokens
    return gated(*last) if isinstance(last, GatedSum) else last


def _is_only_forward(block: nn.Module) -> TypeGuard[LiTBlock]:
    """Whether calling `block` is the forward of a `LiTBlock` as it is here, compiled or not."""
    return type(block) is LiTBlock and LiTBlock.forward is _FORWARD and is_unhooked(block)


def _length(num_blocks: int) -> int:
    """Blocks of a run: all runs of a model are of one length, and share one compilation."""
    return max(length for length in range(1, _LONGEST + 1) if num_blocks % length == 0)


class BlockRuns:
    """``x <- block_l(x, ...)`` for all blocks l of a LiT, once compiled by runs of up to four.

    Blocks are called, each by itself, where calling them is more than their forward, with hooks and
    wrappers (FSDP) and gradient checkpoints; and compiled ones in training, where a graph of
    several keeps more for its gradients than their own do (71 tensors of tokens instead of 68, of
    four blocks). Else they run in a row, and only the last adds its last sum by itself.

    Belongs to one model, and is no part of its state.
    """

    def __init__(self) -> None:
        self._compiled: Callable[..., Tensor] | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()  # as a compiled module, a copy is not compiled

    def compile(self, **options: Any) -> None:
        """Compiles runs; `options` are those of `torch.compile`."""
        self._compiled = torch.compile(_run, **options)

    def __call__(
        self,
        blocks: nn.ModuleList,
        hidden_states: Tensor,
        time_features: Tensor,
        class_labels: Tensor | None,
        attention_kwargs: dict[str, Any],
        modulations: Sequence[Tensor | None],
        checkpoint: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Tokens after the last block.

        Args:
            blocks: of `LiTBlock`.
            hidden_states: ``(B, N, C)``, see `LiTBlock`.
            time_features: ``(B, 256)``, see `LiTBlock`.
            class_labels: ``(B,)`` int64.
            attention_kwargs: for each block's attention.
            modulations: for each block ``(B, 6 C)`` or None, see `BlockConditions`.
            checkpoint: calls ``block(*arguments)`` and keeps no activations of it; None for none.

        Returns:
            ``(B, N, C)``.
        """
        shared = (time_features, class_labels, attention_kwargs)
        plain = [block for block in blocks if _is_only_forward(block)]
        if checkpoint is None and len(plain) == len(blocks):
            if self._compiled is not None and not (
                torch.is_grad_enabled() or torch.compiler.is_compiling()
            ):
                length = _length(len(plain))
                for start in range(0, len(plain), length):
                    run = slice(start, start + length)
                    hidden_states = self._compiled(
                        tuple(plain[run]), hidden_states, *shared, tuple(modulations[run])
                    )
                return hidden_states
            if all(block._compiled_call_impl is None for block in plain):
                return _run(plain, hidden_states, *shared, modulations)
        for block, modulation in zip(blocks, modulations, strict=True):
            arguments = (hidden_states, *shared, modulation)
            hidden_states = checkpoint(block, *arguments) if checkpoint else block(*arguments)
        return hidden_states
