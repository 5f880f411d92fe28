"""Parameters and multiply-adds of every name equal the table of the papers."""

import pytest
import timm
import torch
from torch import nn

from golden_vision import layouts
from lintra.vision import load_official
from lintra.vision.attention import (
    CrossShapedWindowAttention,
    InLineAttention,
    LinearMixer,
    SpatialReductionAttention,
)
from lintra.vision.models.swin_block import FoldableWindowAttention
from vision_names import NAMES

LAYOUTS = layouts()
META = {name: timm.create_model(name, device="meta") for name in NAMES}


def attention_macs(attn: nn.Module, tokens: int, grid: tuple[int, int], dim: int) -> int:
    """Multiply-adds beyond the projections, for `tokens` on `grid` and perhaps a class token."""
    patches = grid[0] * grid[1]
    if isinstance(attn, LinearMixer):
        # The cheaper of the two orders.
        total = 2 * tokens * dim * min(tokens, dim // attn.num_heads)
        if isinstance(attn, InLineAttention):
            total += 9 * patches * dim + sum(c.weight.numel() for c in attn.residual[::2])
        else:
            total += attn.dwc.weight.numel() * attn.num_heads * patches
        return total + (attn.lepe.weight.numel() * patches if attn.lepe is not None else 0)
    if isinstance(attn, CrossShapedWindowAttention):
        total = 0
        for branch, lepe in enumerate(attn.lepe):
            stripe = attn._stripe(branch, grid)
            width = dim // attn.num_branches
            total += patches * (2 * stripe[0] * stripe[1] * width + lepe.weight.numel())
        return total
    if isinstance(attn, FoldableWindowAttention):
        return 2 * tokens * attn.window_area * dim
    if isinstance(attn, SpatialReductionAttention):
        reduced = patches // attn.sr_ratio**2
        saved = (tokens - reduced) * attn.kv.weight.numel()
        conv = attn.sr.weight.numel() * reduced if attn.sr is not None else 0
        return 2 * tokens * reduced * dim + conv - saved
    return 2 * tokens * tokens * dim


def block_macs(block: nn.Module, grid: tuple[int, int], prefix: int) -> int:
    tokens = grid[0] * grid[1] + prefix
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    projections = tokens * sum(linear.weight.numel() for linear in linears)
    return projections + attention_macs(block.attn, tokens, grid, linears[0].in_features)


def stages_of(model: nn.Module, size: int) -> list[tuple[nn.Module | None, list, tuple[int, int]]]:
    """(downsampling, blocks, grid) of every stage."""
    if hasattr(model, "blocks"):
        return [(model.patch_embed.proj, list(model.blocks), model.patch_embed.grid_size)]
    stages = list(model.layers if hasattr(model, "layers") else model.stages)
    side, found = size // 4, []
    for index, stage in enumerate(stages):
        if index:
            side //= 2
        source = stage.downsample if index else model.patch_embed
        layer = getattr(source, "reduction", None) or source.proj
        found.append((layer, list(stage.blocks), (side, side)))
    return found


def giga_macs(model: nn.Module) -> float:
    prefix = getattr(model, "num_prefix_tokens", 0)
    total = model.get_classifier().weight.numel()
    for downsample, blocks, grid in stages_of(model, model.default_cfg["input_size"][-1]):
        total += downsample.weight.numel() * grid[0] * grid[1]
        total += sum(block_macs(block, grid, prefix) for block in blocks)
    return total / 1e9


def test_every_name_is_registered_once() -> None:
    modules = ("linear_deit", "linear_swin", "linear_pvt", "linear_cswin")
    listed = [name for module in modules for name in timm.list_models(module=module)]
    assert sorted(listed) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs(name: str) -> None:
    variant, millions, macs = NAMES[name]
    model = META[name]
    mine = sum(parameter.numel() for parameter in model.parameters())
    # The table is rounded, not always to the nearest; layouts.json has the parameters exactly.
    assert mine / 1e6 == pytest.approx(millions, abs=0.0075)
    assert giga_macs(model) == pytest.approx(macs, abs=0.0075)
    dead = sum(
        torch.Size(shape).numel()
        for key, shape, *_ in LAYOUTS[variant]
        if key.endswith(".scale") or (key == "cls_token" and "slab" in variant)
    )
    buffers = ("running_mean", "running_var", "attn_mask", "relative_position_index")
    official = sum(
        torch.Size(shape).numel()
        for key, shape, *dtype in LAYOUTS[variant]
        if not key.endswith(buffers) and dtype != ["int64"]
    )
    assert mine == official - dead


@pytest.mark.parametrize("name", NAMES)
def test_official_layout_loads_strictly(name: str) -> None:
    rows = LAYOUTS[NAMES[name][0]]
    counters = ("iter", "total_step")
    state = {
        key: torch.ones(shape) if key.endswith(counters) else torch.empty(shape, device="meta")
        for key, shape, *_ in rows
    }
    report = load_official(META[name], state)
    assert report.untouched == []
    assert report.resized == []
    assert len(report.loaded) == len(META[name].state_dict())
    assert len(report.loaded) + len(report.dropped) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_transform(name: str) -> None:
    cfg = META[name].default_cfg
    size = cfg["input_size"][-1]
    assert int(size / cfg["crop_pct"]) == int(256 / 224 * size)
    assert cfg["crop_mode"] == ("squash" if "inline" in name else "center")
    assert cfg["interpolation"] == "bicubic"
    tag = "inline_in1k" if "inline" in name else "slab_in1k"
    assert cfg["tag"] == tag
