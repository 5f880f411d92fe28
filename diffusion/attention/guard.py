"""A check that no layer of a linear model has silently gone back to full attention."""

from collections.abc import Mapping

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from .linear import LiTAttention, LiTAttnProcessor
from .local import ClearAttnProcessor


def _why_not_linear(module: nn.Module, declared_full: bool) -> str | None:
    """The reason why an attention module is not linear self-attention, None if it is (or cross)."""
    processor = module.processor
    if isinstance(processor, ClearAttnProcessor):
        if processor.full_attention and not declared_full:
            return "its processor attends fully, which the configuration does not declare"
        return None
    if isinstance(module, LiTAttention):
        if isinstance(processor, LiTAttnProcessor):
            return None
        return f"its processor is {type(processor).__name__}"
    if getattr(module, "is_cross_attention", False):
        return None  # attends to the prompt, whose length does not grow with the image
    return f"it is {type(module).__name__} with {type(processor).__name__}"


def _declared_full(model: nn.Module) -> set[str]:
    """Names of the layers for which a configuration declares full attention."""
    declared = set()
    for prefix, module in model.named_modules():
        names: Mapping[str, bool] = getattr(module, "attention_layer_names", dict)()
        declared |= {f"{prefix}.{name}".lstrip(".") for name, full in names.items() if full}
    return declared


def assert_linear(model: nn.Module) -> None:
    """Raises unless every self-attention layer of `model` is linear (LiT) or local (CLEAR).

    Layers that the configuration declares in `full_attention_layers` pass. Call it after anything
    that may replace attention modules or processors: loading adapters or ControlNets, fusing
    projections, resetting processors.

    Raises:
        ValueError: names the first layers that are not linear, or says that there is no attention.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention | AttentionModuleMixin)
    }
    if not layers:
        raise ValueError(f"`model` must have attention layers, got a {type(model).__name__}")
    declared = _declared_full(model)
    reasons = {name: _why_not_linear(module, name in declared) for name, module in layers.items()}
    full = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if full:
        raise ValueError(
            f"`model` must attend linearly in every layer, got {len(full)} of {len(layers)} layers"
            f" that do not: {'; '.join(full[:3])}"
        )
