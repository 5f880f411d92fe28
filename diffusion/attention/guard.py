"""A check that no layer of a linear model has silently gone back to full attention."""

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from .linear import LiTAttention, LiTAttnProcessor


def _why_not_linear(module: nn.Module) -> str | None:
    """The reason why an attention module is not linear self-attention, None if it is (or cross)."""
    if isinstance(module, LiTAttention):
        if isinstance(module.processor, LiTAttnProcessor):
            return None
        return f"its processor is {type(module.processor).__name__}"
    if getattr(module, "is_cross_attention", False):
        return None  # attends to the prompt, whose length does not grow with the image
    return f"it is {type(module).__name__}"


def assert_linear(model: nn.Module) -> None:
    """Raises unless every self-attention layer of `model` is linear.

    Call it after anything that may replace attention modules or processors: loading adapters or
    ControlNets, fusing projections, resetting processors.

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
    reasons = {name: _why_not_linear(module) for name, module in layers.items()}
    full = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if full:
        raise ValueError(
            f"`model` must attend linearly in every layer, got {len(full)} of {len(layers)} layers"
            f" that do not: {'; '.join(full[:3])}"
        )
