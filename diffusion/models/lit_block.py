"""The block of LiT: DiT's adaLN-Zero block with fewer passes over the tokens."""

from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch import Tensor, nn

from .fused_gelu import fuse_gelu
from .modulation import GatedSum, gated, gated_modulated, modulated


def embed_condition(
    embedding: CombinedTimestepLabelEmbeddings, time_features: Tensor, class_labels: Tensor | None
) -> Tensor:
    """Time and label ``(B, C)``; the sinusoids of the time, which all blocks share, are given."""
    return embedding.timestep_embedder(time_features) + embedding.class_embedder(class_labels)


class LiTBlock(nn.Module):
    """``x <- x + a attn(n(x))``, then ``x <- x + a' ff(n'(x))``, n(x) = LN(x) (1 + g) + b.

    a, g, b are ``(B, C)``, a linear map of silu(time + label) of this block (Peebles and Xie 2023,
    arXiv:2212.09748, adaLN-Zero). What `BasicTransformerBlock` computes, with its modules and the
    names of its weights; but a normalisation, its scale and shift and the gate and sum before it
    are one pass over the tokens, and the sinusoids of the time, which all blocks share, come from
    outside, as may a, g and b.

    Args:
        block: of a DiT, with adaLN-Zero and no cross-attention; its modules are taken over.
    """

    def __init__(self, block: BasicTransformerBlock):
        super().__init__()
        self.norm1 = block.norm1
        self.attn1 = block.attn1
        self.norm3 = block.norm3
        self.ff = block.ff
        fuse_gelu(self.ff)

    def forward(
        self,
        hidden_states: Tensor,
        time_features: Tensor,
        class_labels: Tensor | None,
        attention_kwargs: dict[str, Any],
        modulation: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: ``(B, N, C)``, contiguous, or every pass over them takes longer.
            time_features: ``(B, 256)`` in the dtype of `hidden_states`, sinusoids of the timesteps
                as `norm1.emb.time_proj` gives them.
            class_labels: ``(B,)`` int64.
            attention_kwargs: for `attn1`.
            modulation: ``(B, 6 C)``, what the two before give `norm1`, if it is known already, see
                `BlockConditions`.

        Returns:
            ``(B, N, C)``.
        """
        return gated(
            *self.without_sum(
                hidden_states, time_features, class_labels, attention_kwargs, modulation
            )
        )

    def without_sum(
        self,
        hidden_states: Tensor | GatedSum,
        time_features: Tensor,
        class_labels: Tensor | None,
        attention_kwargs: dict[str, Any],
        modulation: Tensor | None = None,
    ) -> GatedSum:
        """The block without its last sum, which may be given to the next block as it is.

        Args:
            hidden_states: ``(B, N, C)``, or what the block before gives so.
            time_features: see `forward`.
            class_labels: see `forward`.
            attention_kwargs: see `forward`.
            modulation: see `forward`.

        Returns:
            Tokens ``(B, N, C)``, what the feed-forward layer adds to them, and its gate ``(B, C)``.
        """
        norm1 = self.norm1
        if modulation is None:
            condition = embed_condition(norm1.emb, time_features, class_labels)
            modulation = norm1.linear(norm1.silu(condition))
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)  # (B, C)
        if isinstance(hidden_states, GatedSum):
            hidden_states, tokens = gated_modulated(norm1.norm, *hidden_states, scale, shift)
        else:
            tokens = modulated(norm1.norm, hidden_states, scale, shift)
        # Without a name, what attention gives is gone before the widest tensors come.
        hidden_states, tokens = gated_modulated(
            self.norm3, hidden_states, self.attn1(tokens, **attention_kwargs), gate,
            scale_ff, shift_ff,
        )  # fmt: skip
        return GatedSum(hidden_states, self.ff(tokens), gate_ff)


# Where diffusers looks up what caches (first block, MagCache) and layer skipping may do to a block.
TransformerBlockRegistry.register(LiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))
