"""Initialisation of diffusion transformers that are trained from scratch."""

from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from torch import nn

_MODULATIONS = (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)


def initialize_dit(model: DiTTransformer2DModel) -> None:
    """The initialisation of DiT (Peebles and Xie 2023, arXiv:2212.09748), in place, also for LiT.

    Xavier-uniform linear layers, the patch embedding like a linear layer, normal(0.02) label and
    time embeddings, and zeros where adaLN-Zero and the output start from nothing. diffusers leaves
    PyTorch's defaults, with which a block does not start as the identity.
    """
    _initialize_linear_layers(model)
    patch = model.pos_embed.proj
    nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
    nn.init.zeros_(patch.bias)
    zero = [model.proj_out_1, model.proj_out_2]
    for block in model.transformer_blocks:
        embedding = block.norm1.emb
        nn.init.normal_(embedding.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(embedding.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedding.timestep_embedder.linear_2.weight, std=0.02)
        zero.append(block.norm1.linear)
    _zero(zero)


def initialize_mmdit(model: ModelMixin) -> None:
    """The same for FLUX and SD3, in place: adaLN-Zero in both streams, and an output of zero."""
    _initialize_linear_layers(model)
    embedder = model.time_text_embed.timestep_embedder
    for linear in (embedder.linear_1, embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    modulations = [module for module in model.modules() if isinstance(module, _MODULATIONS)]
    _zero([*(module.linear for module in modulations), model.proj_out])


def _initialize_linear_layers(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _zero(layers: list[nn.Linear]) -> None:
    for linear in layers:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
