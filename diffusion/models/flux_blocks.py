"""The blocks of FLUX with fewer passes over the tokens, for inference on a GPU.

They bear the names of the blocks that they stand for: accelerate (device maps, FSDP) and diffusers
(compilation of repeated blocks) look blocks up by the name of their class.
"""

from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..untouched import is_unhooked, is_untouched, on_gpu
from .fused_gelu import fuse_gelu, fuses_gelu, linear_gelu
from .modulation import gated, gated_modulated, modulated

_HALF_MAX = 65504


def _fuses(tensors: tuple[Tensor, ...], kind: type[nn.Module], *norms: nn.Module) -> bool:
    """Whether the modules around attention may be computed together; `norms` are of this `kind`.

    torch.compile fuses the stock form itself; in training the gradients have their own passes.
    Where dtypes differ the stock form lets the widest win.
    """
    return (
        on_gpu(tensors[0])
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(x.dtype == tensors[0].dtype for x in tensors)
        and all(type(norm) is kind and is_unhooked(norm) for norm in norms)
    )


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    """A double block: ``x <- x + a attn(n(x))``, ``x <- x + a' ff(n'(x))`` of image and of text.

    n(x) = LN(x) (1 + g) + b, and a, g, b are linear maps of the condition (adaLN-Zero, Peebles and
    Xie 2023, arXiv:2212.09748). The gate and sum of one branch and the norm of the next are one
    pass.

    Args:
        block: its modules are taken over.
    """

    def __init__(self, block: transformer_flux.FluxTransformerBlock):
        nn.Module.__init__(self)
        for name, module in block.named_children():
            setattr(self, name, module)
        fuse_gelu(self.ff)
        fuse_gelu(self.ff_context)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text and image tokens after the block; arguments as in diffusers."""
        norms, tensors = (self.norm1, self.norm1_context), (hidden_states, encoder_hidden_states)
        if not _fuses((*tensors, temb), AdaLayerNormZero, *norms):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        image, text = (norm.linear(norm.silu(temb)).chunk(6, dim=1) for norm in norms)
        attended, text_attended, *further = self.attn(
            hidden_states=modulated(self.norm1.norm, hidden_states, image[1], image[0]),
            encoder_hidden_states=modulated(
                self.norm1_context.norm, encoder_hidden_states, text[1], text[0]
            ),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = _feed_forward(self.norm2, self.ff, hidden_states, attended, *image[2:])
        for update in further:
            hidden_states = hidden_states + update
        encoder_hidden_states = _feed_forward(
            self.norm2_context, self.ff_context, encoder_hidden_states, text_attended, *text[2:]
        )
        return _clipped(encoder_hidden_states), hidden_states


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """A single block, ``x <- x + a W [attn(n(x)), gelu(V n(x))]``, text and image in one.

    W [y, z] is computed as ``W_1 y + W_2 z``, which spares a copy of both; GELU is the matrix
    product's.

    Args:
        block: its modules are taken over.
    """

    def __init__(self, block: transformer_flux.FluxSingleTransformerBlock):
        nn.Module.__init__(self)
        self.mlp_hidden_dim = block.mlp_hidden_dim
        for name, module in block.named_children():
            setattr(self, name, module)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text and image tokens after the block; arguments as in diffusers."""
        norm = self.norm
        if not _fuses((hidden_states, encoder_hidden_states, temb), AdaLayerNormZeroSingle, norm):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        num_text = encoder_hidden_states.shape[1]
        hidden_states = torch.cat((encoder_hidden_states, hidden_states), dim=1)
        shift, scale, gate = norm.linear(norm.silu(temb)).chunk(3, dim=1)
        tokens = modulated(norm.norm, hidden_states, scale, shift)
        attended = self.attn(
            hidden_states=tokens,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        if _is_tanh_gelu(self.act_mlp) and fuses_gelu(self.proj_mlp, tokens):
            mlp = linear_gelu(self.proj_mlp, tokens)
        else:
            mlp = self.act_mlp(self.proj_mlp(tokens))
        update = _project_both(self.proj_out, attended, mlp)
        hidden_states = _clipped(gated(hidden_states, update, gate))
        return hidden_states[:, :num_text], hidden_states[:, num_text:]


def _feed_forward(
    norm: nn.Module, layer: nn.Module, tokens: Tensor, attended: Tensor, gate: Tensor,
    shift: Tensor, scale: Tensor, gate_ff: Tensor,
) -> Tensor:  # fmt: skip
    """``h + gate_ff layer(norm(h) (1 + scale) + shift)``, ``h = tokens + gate attended``."""
    tokens, normed = gated_modulated(norm, tokens, attended, gate, scale, shift)
    return gated(tokens, layer(normed), gate_ff)


def _is_tanh_gelu(module: Any) -> bool:
    return type(module) is nn.GELU and module.approximate == "tanh" and is_unhooked(module)


def _project_both(linear: Any, first: Tensor, second: Tensor) -> Tensor:
    """`linear` of both side by side, ``(B, N, C)`` and ``(B, N, E)``."""
    is_plain = is_untouched(linear, nn.Linear) and linear.bias is not None
    if (
        not is_plain
        or is_in_torch_dispatch_mode()  # FlopCounterMode does not know a product in place
        or torch.is_autocast_enabled(first.device.type)
        or not linear.weight.dtype == linear.bias.dtype == first.dtype == second.dtype
    ):
        return linear(torch.cat((first, second), dim=2))
    width, weight = first.shape[-1], linear.weight.t()
    out = torch.addmm(linear.bias, first.flatten(0, 1), weight[:width])
    out.addmm_(second.flatten(0, 1), weight[width:])
    return out.unflatten(0, first.shape[:2])


def _clipped(tokens: Tensor) -> Tensor:
    return tokens.clip(-_HALF_MAX, _HALF_MAX) if tokens.dtype == torch.float16 else tokens


def fuse_blocks(model: transformer_flux.FluxTransformer2DModel) -> None:
    """Puts these blocks in the place of a model's own, whose modules they take over."""
    for blocks, kind in (
        (model.transformer_blocks, FluxTransformerBlock),
        (model.single_transformer_blocks, FluxSingleTransformerBlock),
    ):
        for index, block in enumerate(blocks):
            blocks[index] = kind(block)


# Where diffusers looks up what caches (first block, MagCache) and layer skipping may do to a block.
for _kind in (FluxTransformerBlock, FluxSingleTransformerBlock):
    TransformerBlockRegistry.register(
        _kind,
        TransformerBlockMetadata(
            return_hidden_states_index=1, return_encoder_hidden_states_index=0
        ),
    )
