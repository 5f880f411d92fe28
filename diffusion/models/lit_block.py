"""The block of LiT: DiT's adaLN-Zero block with fewer passes over the tokens."""

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn


class LiTBlock(nn.Module):
    """``x <- x + a attn(n(x))``, then ``x <- x + a' ff(n'(x))``, n(x) = LN(x) (1 + g) + b.

    a, g, b are ``(B, C)``, a linear map of silu(time + label) of this block (Peebles and Xie 2023,
    arXiv:2212.09748, adaLN-Zero). What `BasicTransformerBlock` computes, with its modules and the
    names of its weights; but each scale and shift, and each gate and sum, is one pass over the
    tokens instead of two, and the sinusoids of the time, which all blocks share, come from outside.

    Args:
        block: of a DiT, with adaLN-Zero and no cross-attention; its modules are taken over.
    """

    def __init__(self, block: BasicTransformerBlock):
        super().__init__()
        self.norm1 = block.norm1
        self.attn1 = block.attn1
        self.norm3 = block.norm3
        self.ff = block.ff

    def forward(
        self,
        hidden_states: Tensor,
        time_features: Tensor,
        class_labels: Tensor,
        attention_kwargs: dict[str, Any],
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: ``(B, N, C)``.
            time_features: ``(B, 256)``, sinusoids of the timesteps, as `norm1.emb.time_proj` gives.
            class_labels: ``(B,)`` int64.
            attention_kwargs: for `attn1`.

        Returns:
            ``(B, N, C)``.
        """
        embedding = self.norm1.emb
        condition = embedding.timestep_embedder(time_features.to(hidden_states.dtype))
        condition = condition + embedding.class_embedder(class_labels)
        modulation = self.norm1.linear(self.norm1.silu(condition)).unsqueeze(1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)  # (B, 1, C)
        tokens = torch.addcmul(shift, self.norm1.norm(hidden_states), 1 + scale)
        attended = self.attn1(tokens, **attention_kwargs)
        hidden_states = torch.addcmul(hidden_states, gate, attended)
        tokens = torch.addcmul(shift_ff, self.norm3(hidden_states), 1 + scale_ff)
        return torch.addcmul(hidden_states, gate_ff, self.ff(tokens))
