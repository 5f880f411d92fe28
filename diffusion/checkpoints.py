"""Official DiT files (Peebles and Xie 2023, arXiv:2212.09748) as diffusers models."""

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from .models.transformer_dit import OfficialDiTTransformer2DModel

State = dict[str, Tensor]

# name -> blocks, width and heads; shapes tell the first two only.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

# What the weights are computed with: the authors' numbers, or those of diffusers' own class, which
# any installation of diffusers opens but whose outputs are others.
FORMS: dict[str, tuple[type[DiTTransformer2DModel], dict[str, float]]] = {
    "official": (OfficialDiTTransformer2DModel, {"norm_eps": 1e-6, "time_freq_shift": 0.0}),
    "diffusers": (DiTTransformer2DModel, {"norm_eps": 1e-5}),
}

# Official name -> ours, without `.weight` and `.bias`.
_MODEL_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# Layers of the model that diffusers keeps a copy of in each block.
_SHARED_LAYERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_BLOCK_LAYERS = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_LABELS = "y_embedder.embedding_table.weight"


def read_dit_file(path: str | Path, *, prefer_ema: bool = True) -> tuple[str, State]:
    """The weights in a file, and the name of the entry that held them.

    Args:
        path: a bare state dict or a training checkpoint with ``ema`` and ``model``, written by
            torch.save (read without running code of the file) or safetensors.
        prefer_ema: take the averaged weights of a training checkpoint.

    Returns:
        The entry, "" for a bare state dict, and tensors by official name, on the CPU.

    Raises:
        ValueError: no such file, one that is cut off or of another format, or no weights in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`checkpoint` must be an existing file, got {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            contents: Any = load_file(path)
        else:
            # Training checkpoints hold the command line's options beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, safetensors and torch each have their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            # torch would tell how to run the code of the file.
            reason = "cut off, or with other objects than tensors and options"
        raise ValueError(
            "`checkpoint` must be a whole file of tensors by torch.save or safetensors, got"
            f" {str(path)!r}: {reason}"
        ) from error
    entries = ("ema", "model") if prefer_ema else ("model", "ema")
    is_mapping = isinstance(contents, Mapping)
    source = next((e for e in entries if is_mapping and isinstance(contents.get(e), Mapping)), "")
    state = contents[source] if source else contents
    if not is_mapping or not any(isinstance(value, Tensor) for value in state.values()):
        found = ", ".join(map(str, list(contents)[:8])) if is_mapping else type(contents).__name__
        raise ValueError(
            f"`checkpoint` must be a state dict or hold one as ema or model, got {found}"
        )
    # DistributedDataParallel and torch.compile prefix every name.
    prefix = re.compile(r"^(module\.|_orig_mod\.)+")
    return source, {
        prefix.sub("", str(name)): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _official_names(num_blocks: int) -> list[str]:
    layers = [*_MODEL_LAYERS, "t_embedder.mlp.0", "t_embedder.mlp.2"]
    layers += [f"blocks.{i}.{layer}" for i in range(num_blocks) for layer in _BLOCK_LAYERS]
    return ["pos_embed", _LABELS, *(f"{name}.{t}" for name in layers for t in ("weight", "bias"))]


def _listing(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_names(state: State) -> int:
    """The number of blocks, once every name of a DiT is there and no other."""
    numbers = [int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))]
    num_blocks = max(numbers, default=0) + 1
    expected = _official_names(num_blocks)
    if missing := [name for name in expected if name not in state]:
        raise ValueError(f"`checkpoint` must hold every tensor of a DiT, lacks {_listing(missing)}")
    if other := sorted(set(state) - set(expected)):
        raise ValueError(f"`checkpoint` must hold only a DiT, got also {_listing(other)}")
    for name, dims in {"x_embedder.proj.weight": 4, "pos_embed": 3, _LABELS: 2}.items():
        if state[name].ndim != dims:
            shape = tuple(state[name].shape)
            raise ValueError(f"`checkpoint` must hold {name} of {dims} dimensions, got {shape}")
    return num_blocks


def _infer_num_classes(rows: int, num_classes: int | None) -> int:
    if num_classes is None:
        # ImageNet without a row for "no class", which models trained without label dropout lack.
        return rows if rows == 1000 else rows - 1
    if num_classes not in (rows, rows - 1):
        raise ValueError(
            f"`num_classes` must be {rows - 1} or {rows} for a label table of {rows} rows, got"
            f" {num_classes}"
        )
    return num_classes


def _infer_num_heads(width: int, num_heads: int | None) -> int:
    known = {width: heads for _, width, heads in SIZES.values()}
    if num_heads is None and width not in known:
        raise ValueError(f"`num_heads` must be given for a width of {width} channels, got None")
    heads = known[width] if num_heads is None else num_heads
    if heads < 1 or width % heads:
        raise ValueError(f"`num_heads` must divide the {width} channels, got {heads}")
    return heads


def infer_dit_config(
    state: State, *, num_heads: int | None = None, num_classes: int | None = None
) -> dict[str, Any]:
    """Arguments of `DiTTransformer2DModel` for official weights.

    Args:
        state: tensors by official name.
        num_heads: attention heads, which no shape tells; None takes those of S, B, L and XL.
        num_classes: without "no class"; None takes all rows of the label table but the last, or
            1000 if there are 1000 rows.

    Raises:
        ValueError: missing or other tensors, shapes of no DiT, a label table of other classes.
    """
    num_blocks = _check_names(state)
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = _infer_num_heads(width, num_heads)
    side = math.isqrt(state["pos_embed"].shape[1])
    if state["pos_embed"].shape != (1, side * side, width):
        raise ValueError(
            f"`checkpoint` must hold pos_embed of a square grid and {width} channels, got"
            f" {tuple(state['pos_embed'].shape)}"
        )
    outputs = state["final_layer.linear.weight"].shape[0]
    if outputs not in (channels * patch**2, 2 * channels * patch**2):
        raise ValueError(
            f"`checkpoint` must predict {channels} channels, or {2 * channels} with the variance,"
            f" a pixel of {patch} x {patch} patches, got {outputs} numbers a patch"
        )
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": outputs // patch**2,
        "num_layers": num_blocks,
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": _infer_num_classes(state[_LABELS].shape[0], num_classes),
    }


def rename_dit_state(state: State, *, num_blocks: int, num_classes: int) -> State:
    """Official tensors by the names of `DiTTransformer2DModel`, without the position table.

    diffusers' label table always has a last row for "no class": zeros where the weights lack it.
    """
    table = state[_LABELS]
    missing_rows = num_classes + 1 - table.shape[0]
    state = {**state, _LABELS: torch.cat([table, table.new_zeros(missing_rows, table.shape[1])])}
    renamed: State = {}

    def move(source: str, targets: tuple[str, ...], *, split: bool) -> None:
        for kind in ("weight", "bias"):
            if (tensor := state.get(f"{source}.{kind}")) is not None:
                parts = tensor.chunk(len(targets)) if split else [tensor] * len(targets)
                for target, part in zip(targets, parts, strict=True):
                    renamed[f"{target}.{kind}"] = part

    for source, target in _MODEL_LAYERS.items():
        move(source, (target,), split=False)
    blocks = [f"transformer_blocks.{i}" for i in range(num_blocks)]
    for source, target in _SHARED_LAYERS.items():
        move(source, tuple(f"{block}.{target}" for block in blocks), split=False)
    for i, block in enumerate(blocks):
        for source, targets in _BLOCK_LAYERS.items():
            names = tuple(f"{block}.{target}" for target in targets)
            move(f"blocks.{i}.{source}", names, split=True)
    return renamed


def load_official_dit(
    state: State,
    *,
    form: str = "official",
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> DiTTransformer2DModel:
    """A diffusers model with official weights, in float32 and eval mode.

    Args:
        state: tensors by official name, see `read_dit_file`.
        form: ``official`` computes what the authors' code computes; ``diffusers`` is diffusers' own
            class, for weights that were fine-tuned with it.
        num_heads, num_classes: see `infer_dit_config`.

    Raises:
        ValueError: an unknown form, weights that are not those of a DiT, a position table that is
            not the fixed one.
    """
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}")
    config = infer_dit_config(state, num_heads=num_heads, num_classes=num_classes)
    cls, numbers = FORMS[form]
    model = cls(**config, **numbers)
    renamed = rename_dit_state(
        state, num_blocks=config["num_layers"], num_classes=config["num_embeds_ada_norm"]
    )
    wrong = [
        f"{name} {tuple(renamed[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in model.state_dict().items()
        if renamed[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"`checkpoint` must hold shapes of one DiT, got {_listing(wrong)}")
    # Half precision rounds the table's values, all in [-1, 1], by less than 0.01.
    offset = (state["pos_embed"].float() - model.pos_embed.pos_embed).abs().max().item()
    if not offset < 0.01:
        raise ValueError(
            f"`checkpoint` must hold the fixed sin-cos pos_embed, got one that is {offset:.3g} off"
        )
    model.load_state_dict(renamed)
    return model.eval()


def dit_name(model: DiTTransformer2DModel) -> str:
    """`DiT-XL/2` and the like; blocks, width and heads of others."""
    config = model.config
    size = (config.num_layers, model.inner_dim, config.num_attention_heads)
    known = {numbers: name for name, numbers in SIZES.items()}
    if size in known:
        return f"DiT-{known[size]}/{config.patch_size}"
    return f"DiT-{size[0]}x{size[1]}h{size[2]}/{config.patch_size}"
