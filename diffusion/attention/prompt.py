"""Cross-attention to a prompt in blocks whose self-attention is linear."""

from typing import Any

from diffusers.models.attention_processor import Attention, AttentionProcessor
from torch import Tensor

from .linear import LiTAttnProcessor


class PromptAttention(Attention):
    """diffusers' `Attention` to a prompt; a block may call it with the arguments of `LiTAttention`.

    diffusers' blocks hand the same keyword arguments to both of their attention layers: the token
    grid, which linear attention needs, means nothing here.
    """

    def set_processor(self, processor: AttentionProcessor) -> None:
        """Accepts any processor but `LiTAttnProcessor`, which cannot attend to a prompt."""
        if isinstance(processor, LiTAttnProcessor):
            raise ValueError("`processor` must attend to a prompt, got a LiTAttnProcessor")
        super().set_processor(processor)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        return super().forward(
            hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
        )
