"""Cases of one step of FLUX with CLEAR attention: dense, and FlexAttention with the same mask."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from lintra.diffusion.attention.local import ClearAttnProcessor
from lintra.diffusion.models.transformer_clear_flux import ClearFluxTransformer2DModel

from . import ada_layer_norm, local_attention, rotary_rms_norm
from .case import Case, Peer, Run, check_shape
from .models import Mode

LAYOUT = "pixels,radius"
# Side in pixels: speed-up of radius 8 over dense attention, where a step of it takes seconds, or
# over FlexAttention.
SIZES = {1024: ("sdpa", 1.02), 2048: ("sdpa", 1.41), 4096: ("sdpa", 2.9), 8192: ("flex", 1.3)}
RADII = (8, 16)
_DENSE_PIXELS = 4096
# FLUX.1-dev: 11.9 B parameters, 22.2 GiB in bfloat16.
_CONFIG: dict[str, Any] = {"guidance_embeds": True}
_TINY: dict[str, Any] = {
    "guidance_embeds": True,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 24,
    "pooled_projection_dim": 8,
}
_TINY_SIZES = ((64, 2), (96, 3))


class _FlexProcessor(ClearAttnProcessor):
    """`ClearAttnProcessor` on another function of query, key and value."""

    def __init__(self, attend: Run):
        super().__init__()
        self.attend = attend

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Tensor:
        return self.attend(query, key, value)


def stock_model(mode: Mode) -> FluxTransformer2DModel:
    """FLUX.1-dev with random weights, made on the device: 11.9 B float32 numbers would not fit."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**(_TINY if mode.tiny else _CONFIG))
    model = model.to(mode.dtype).to_empty(device=mode.device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval().requires_grad_(False)


def _inputs(
    side: int, num_text: int, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    grid = side // 16
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    return [
        torch.randn(1, grid * grid, 64, **options),
        torch.randn(1, num_text, config.get("joint_attention_dim", 4096), **options),
        torch.randn(1, config.get("pooled_projection_dim", 768), **options),
        torch.full((1,), 0.5, **options),
        FluxPipeline._prepare_latent_image_ids(1, grid, grid, device, dtype),
        torch.zeros(num_text, 3, **options),
        torch.full((1,), 3.5, device=device),
    ]


def _step(model: nn.Module, options: dict[str, Any], *inputs: Tensor) -> Tensor:
    return model(*inputs, return_dict=False, **options)[0]


def build(
    side: int,
    radius: int,
    mode: Mode,
    stock: Callable[[], FluxTransformer2DModel],
    with_dense: bool,
    targets: dict[tuple[str, str], float],
) -> Case:
    """The case of a square image of `side` pixels; all implementations share the weights."""
    grid, num_text = side // 16, 5 if mode.tiny else local_attention.PREFIX
    config = _TINY if mode.tiny else _CONFIG
    heads, dim = config.get("num_attention_heads", 24), config.get("attention_head_dim", 128)
    # As a loop over steps would pass it; otherwise each call waits for the device.
    options = {"joint_attention_kwargs": {"spatial_shape": (grid, grid)}}

    def ours() -> Run:
        return partial(
            _step, ClearFluxTransformer2DModel.from_teacher(stock(), radius=radius), options
        )

    def flex() -> Run:
        attend = local_attention.flex_peer(grid, radius, num_text).prepare()
        model = ClearFluxTransformer2DModel.from_teacher(stock(), radius=radius)
        model.set_attn_processor(_FlexProcessor(attend))
        return partial(_step, model, options)

    def dense() -> Run:
        return partial(_step, stock(), {})

    peers = {"flex": Peer(flex, is_compiled=True)}
    if with_dense:
        peers["sdpa"] = Peer(dense)
    return Case(
        op="clear",
        group="FLUX tiny" if mode.tiny else "FLUX.1-dev",
        shape=f"{side}px r{radius}",
        make=partial(_inputs, side, num_text, config),
        ours=Peer(ours),
        checks=(
            local_attention.build((grid, radius, heads, dim, num_text), "FLUX"),
            rotary_rms_norm.build((1, num_text, heads, dim), "FLUX"),
            *(ada_layer_norm.build((1, num_text, heads * dim, kind), "FLUX") for kind in (0, 1)),
            # As many tokens as make it large, if the image has them.
            ada_layer_norm.build((1, num_text + min(grid, 128) ** 2, heads * dim, 2), "FLUX"),
        ),
        peers=peers,
        targets=targets,
        directions=("fwd",),
        takes_turns=True,
    )


def cases(mode: Mode, shapes: Sequence[Sequence[int]] | None = None) -> list[Case]:
    """Cases of one eager step, batch 1, 512 text tokens; `shapes` are (pixels, radius).

    What a report calls MiB is beyond weights and inputs. One dense step at 4096 px takes 7 s, one
    of FlexAttention at 8192 px 13 s: `--calls 2` and `--only 8192px` keep a run short.

    Raises:
        ValueError: a shape of another form; a training step.
    """
    if mode.training:
        raise ValueError("`training` must not be set for clear, which measures a sampling step")
    for shape in shapes or ():
        check_shape(shape, (2,), LAYOUT)
        if shape[0] % 16:
            raise ValueError(f"`shape` must be {LAYOUT}, pixels a multiple of 16, got {shape}")
    usual = _TINY_SIZES if mode.tiny else [(side, radius) for side in SIZES for radius in RADII]
    sizes = [(shape[0], shape[1]) for shape in shapes or usual]
    stock = cache(partial(stock_model, mode))
    found = []
    for index, (side, radius) in enumerate(sizes):
        # The dense step does not depend on the radius: once a size is enough.
        first = side not in [other for other, _ in sizes[:index]]
        with_dense = first and side <= _DENSE_PIXELS
        targets = {}
        if side in SIZES and radius == RADII[0] and not mode.tiny:
            peer, speedup = SIZES[side]
            targets["fwd", peer] = speedup
        found.append(build(side, radius, mode, stock, with_dense, targets))
    return found
