"""Cases of LiT for text to image against PixArt-Sigma, random weights, 512 to 2048 pixels."""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .case import Case, Peer
from .lit import checks_of, mode_of, prepare, sides_of
from .models import Mode

# (blocks, width, heads of PixArt, heads of LiT), channels of a prompt, its tokens
_SIGMA = ((28, 1152, 16, 4), 4096, 300)
_TINY = ((2, 16, 2, 1), 24, 5)
# pixels -> batch: 8192 or 16384 tokens
BATCHES = {512: 8, 1024: 4, 2048: 1}
_TINY_BATCHES = {64: 2}
PEER = "pixart"


def _model(linear: bool, side: int, mode: Mode) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    from lintra.diffusion.models.transformer_lit_pixart import LiTPixArtTransformer2DModel

    (blocks, width, heads, linear_heads), prompt_channels, _ = _TINY if mode.tiny else _SIGMA
    config: dict[str, Any] = {
        "num_layers": blocks,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": width,
        "caption_channels": prompt_channels,
        "sample_size": side // 8,
        "use_additional_conditions": False,
    }
    with torch.device(mode.device):  # at once: half a billion numbers
        if linear:
            return LiTPixArtTransformer2DModel(**config, num_linear_heads=linear_heads)
        return PixArtTransformer2DModel(**config)


def _inputs(
    batch: int, side: int, mode: Mode, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    _, channels, tokens = _TINY if mode.tiny else _SIGMA
    kind = torch.float32 if mode.training else dtype
    latents = torch.randn(batch, 4, side // 8, side // 8, device=device, dtype=kind)
    prompt = torch.randn(batch, tokens, channels, device=device, dtype=kind)
    # Prompts of half the tokens, as pipelines pad them.
    mask = (torch.arange(tokens, device=device) < tokens // 2).expand(batch, -1).to(kind)
    return [latents, prompt, mask, torch.randint(1000, (batch,), device=device)]


def _forward(
    model: nn.Module, latents: Tensor, prompt: Tensor, mask: Tensor, steps: Tensor
) -> Tensor:
    return model(latents, prompt, steps, encoder_attention_mask=mask, return_dict=False)[0]


def build(side: int, batch: int, mode: Mode) -> Case:
    """The case at images of `side` pixels."""

    def entry(linear: bool) -> Peer:
        return Peer(partial(prepare, partial(_model, linear, side, mode), mode, _forward))

    size, *_ = _TINY if mode.tiny else _SIGMA
    return Case(
        op="lit_pixart",
        group="tiny" if mode.tiny else "Sigma",
        shape=f"{side}px B{batch} {mode}",
        make=partial(_inputs, batch, side, mode),
        ours=entry(True),
        checks=checks_of("PixArt", size, side),
        peers={PEER: entry(False)},
        directions=("step" if mode.training else "fwd",),
        images=batch,
        takes_turns=True,
    )


def cases(mode: Mode, shapes: Sequence[Sequence[int]] | None = None) -> list[Case]:
    """All resolutions; `shapes` are (pixels, batch) instead of the usual ones.

    Raises:
        ValueError: a shape of another form.
    """
    import_module("lintra.diffusion.models.transformer_lit_pixart")  # before anything is timed
    wanted = sides_of(shapes, _TINY_BATCHES if mode.tiny else BATCHES)
    return [build(side, batch, mode_of(mode)) for side, batch in wanted]
