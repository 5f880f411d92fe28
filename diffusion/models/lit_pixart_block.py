"""The block of LiT for text to image: PixArt's with fewer passes over the tokens."""

from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from .fused_gelu import fuse_gelu
from .modulation import gated, gated_modulated, modulated


class LiTPixArtBlock(nn.Module):
    """``x <- x + a attn(n(x))``, ``x <- x + attn2(x, prompt)``, ``x <- x + a' ff(n'(x))``,
    n(x) = LN(x) (1 + g) + b.

    a, g, b are ``(B, C)``: what all blocks are told of the time, plus this block's table (Chen et
    al. 2023, arXiv:2310.00426, adaLN-single). What `BasicTransformerBlock` computes, with its
    modules and the names of its weights; but a normalisation with its scale and shift is one pass
    over the tokens, which keep their channels side by side.

    Args:
        block: of a PixArt, with adaLN-single; its modules are taken over.
    """

    def __init__(self, block: BasicTransformerBlock):
        super().__init__()
        self.norm1 = block.norm1
        self.attn1 = block.attn1
        self.norm2 = block.norm2
        self.attn2 = block.attn2
        self.ff = block.ff
        self.scale_shift_table = block.scale_shift_table
        fuse_gelu(self.ff)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """One block; arguments are those of `BasicTransformerBlock`.

        Args:
            hidden_states: ``(B, N, C)``.
            attention_mask: for `attn1`.
            encoder_hidden_states: the prompt, ``(B, L, C)``.
            encoder_attention_mask: for `attn2`, a bias ``(B, 1, L)``.
            timestep: ``(B, 6 C)``, what all blocks are told of the time.
            cross_attention_kwargs: for both attention layers.
            class_labels: not used.
            added_cond_kwargs: not used.

        Returns:
            ``(B, N, C)``.

        Raises:
            ValueError: no `timestep`.
        """
        if timestep is None:
            raise ValueError("`timestep` must be the (B, 6 C) of adaLN-single, got None")
        options = cross_attention_kwargs or {}
        # The patches' convolution leaves channels first, which sums would keep through all blocks.
        hidden_states = hidden_states.contiguous()
        modulation = self.scale_shift_table + timestep.unflatten(1, (6, -1))
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.unbind(1)  # (B, C)
        tokens = modulated(self.norm1, hidden_states, scale, shift)
        attended = self.attn1(tokens, attention_mask=attention_mask, **options)
        if self.attn2 is None:
            hidden_states, tokens = gated_modulated(
                self.norm2, hidden_states, attended, gate, scale_ff, shift_ff
            )
        else:
            hidden_states = gated(hidden_states, attended, gate)
            del attended
            hidden_states = hidden_states + self.attn2(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **options,
            )
            tokens = modulated(self.norm2, hidden_states, scale_ff, shift_ff)
        return gated(hidden_states, self.ff(tokens), gate_ff)


# Where diffusers looks up what caches (first block, MagCache) and layer skipping may do to a block.
TransformerBlockRegistry.register(
    LiTPixArtBlock, TransformerBlockMetadata(return_hidden_states_index=0)
)
