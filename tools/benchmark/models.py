"""Cases of whole models: linear ones against the softmax models that they replace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import linear_attention, token_conv
from .case import Case, Peer, Run

# (resolution in pixels, batch, lowest speed-up over the softmax model)
Sizes = tuple[tuple[int, int, float], ...]
DEIT_SIZES: Sizes = ((224, 256, 1.0), (1024, 16, 2.0))
TINY_SIZES: Sizes = ((64, 2, 0.0),)
_DEIT = "deit_tiny_patch16_224"
_TIMM = {"inline_deit": "deit_tiny_inline_patch16_224", "slab_deit": "deit_tiny_slab_patch16_224"}
_FORMS = {"inline_deit": "inline", "slab_deit": "sla"}


@dataclass(frozen=True)
class Mode:
    """How models run, ours and the others.

    Args:
        device: where.
        dtype: of weights and inputs; in training that of autocast around float32 weights.
        compile_mode: mode of torch.compile; None runs eagerly.
        training: measure a training step with AdamW instead of a forward.
        tiny: two blocks of a few channels, to try the tool.
        whole: compile diffusion models as one graph instead of block by block.
    """

    device: torch.device
    dtype: torch.dtype
    compile_mode: str | None = "default"
    training: bool = False
    tiny: bool = False
    whole: bool = False

    def __str__(self) -> str:
        if self.compile_mode is None:
            return "eager"
        return f"compile:{self.compile_mode}{' whole' if self.whole else ''}"


def _timm_model(name: str, side: int, mode: Mode) -> nn.Module:
    import timm

    from lintra.vision import fold_norms

    small: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3} if mode.tiny else {}
    model = timm.create_model(name, img_size=side, **small)
    # A training step has its norms; a deployed model has none left that folds.
    return model if mode.training else fold_norms(model.eval())


def forward_of(model: Callable[..., Any], *inputs: Tensor) -> Tensor:
    out = model(*inputs)
    return getattr(out, "sample", out)


def _step(
    model: Callable[..., Any], optimizer: torch.optim.Optimizer, mode: Mode, *inputs: Tensor
) -> Tensor:
    with torch.autocast(mode.device.type, dtype=mode.dtype):
        out = forward_of(model, *inputs)
    loss = out.float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def step_of(model: nn.Module, call: Callable[..., Any], mode: Mode) -> Run:
    """A training step of `model`, whose forward is `call`."""
    fused = mode.device.type == "cuda"
    return partial(_step, call, torch.optim.AdamW(model.parameters(), fused=fused), mode)


def _prepare(make: Callable[[Mode], nn.Module], mode: Mode) -> Run:
    with mode.device:  # a CPU takes most of a minute to fill DiT-XL/2
        model = make(mode)
    model.to(mode.device, torch.float32 if mode.training else mode.dtype)
    model.train(mode.training).requires_grad_(mode.training)
    call: Callable[..., Any] = model
    if mode.compile_mode is not None:
        call = torch.compile(model, dynamic=False, mode=mode.compile_mode)
    return step_of(model, call, mode) if mode.training else partial(forward_of, call)


def _images(
    batch: int, side: int, mode: Mode, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    kind = torch.float32 if mode.training else dtype
    return [torch.randn(batch, 3, side, side, device=device, dtype=kind)]


def operation_cases(name: str, side: int, batch: int, tiny: bool) -> list[Case]:
    """The operations at the shapes at which a model calls them; these are what is checked."""
    grid = side // 16
    heads, dim = 3, 8 if tiny else 64
    tokens, form = 1 + grid * grid, _FORMS[name]
    # DeiT's convolution of SLA has filters of a head; a kernel a sample is InLine's.
    shape = (batch, grid, grid, heads * dim)
    conv = (*shape, 3, 1, 1) if form == "inline" else (*shape, 5, 1, 0)
    return [
        linear_attention.build((batch, tokens, heads, dim), name, form=form),
        token_conv.build(conv, name),
    ]


def build(name: str, side: int, batch: int, speedup: float, mode: Mode) -> Case:
    """The case of ``inline_deit`` or ``slab_deit`` at images of `side` pixels."""
    ours, theirs = (partial(_timm_model, model, side) for model in (_TIMM[name], _DEIT))
    peer, make = "timm", partial(_images, batch, side, mode)
    direction = "step" if mode.training else "fwd"

    def entry(model: Callable[[Mode], nn.Module]) -> Peer:
        return Peer(partial(_prepare, model, mode))

    return Case(
        op=name,
        group=name,
        shape=f"{side}px B{batch} {mode}",
        make=make,
        ours=entry(ours),
        checks=tuple(operation_cases(name, side, batch, mode.tiny)),
        peers={peer: entry(theirs)},
        # The targets are those of inference.
        targets={} if mode.training or not speedup else {("fwd", peer): speedup},
        directions=(direction,),
        images=batch,
        takes_turns=True,
    )


def cases(
    names: Sequence[str], mode: Mode, shapes: Sequence[Sequence[int]] | None = None
) -> list[Case]:
    """Cases of the models `names`; `shapes` are (pixels, batch) instead of the usual ones.

    Raises:
        ValueError: a shape of another form.
    """
    for shape in shapes or ():
        if len(shape) != 2 or shape[0] % 16 or min(shape) < 1:
            raise ValueError(f"`shape` must be pixels (a multiple of 16), batch, got {shape}")
    rows = []
    for name in names:
        sizes = DEIT_SIZES
        if shapes:
            sizes = tuple((side, batch, 0.0) for side, batch in shapes)
        elif mode.tiny:
            sizes = TINY_SIZES
        rows += [build(name, side, batch, speedup, mode) for side, batch, speedup in sizes]
    return rows
