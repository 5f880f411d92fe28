"""Blocks of PVT and CSwin against the official ones, with gradients."""

from functools import partial

import pytest
import torch
from torch import nn

from golden_vision import group, load_vision, relative_error
from lintra.vision.attention import (
    CrossShapedWindowAttention,
    InLineAttention,
    SimplifiedLinearAttention,
    SpatialReductionAttention,
)
from lintra.vision.models.linear_deit import LinearViTBlock
from lintra.vision.models.stages import HierarchicalBlock
from lintra.vision.norm import norm_factory
from vision_names import create_small

TOLERANCE = 1e-6


def our_name(name: str) -> str:
    for theirs, ours in [
        ("norm1.norm1.", "norm1.ln."),
        ("norm1.norm2.", "norm1.repbn."),
        ("norm2.norm1.", "norm2.ln."),
        ("norm2.norm2.", "norm2.repbn."),
        ("norm.norm1.", "norm.ln."),
        ("norm.norm2.", "norm.repbn."),
    ]:
        name = name.replace(theirs, ours) if name.startswith(theirs) else name
    return name


def cswin_name(name: str, branches: int) -> str:
    name = our_name(name)
    if name.startswith(("qkv.", "proj.")):
        return f"attn.{name}"
    if name.startswith("attns."):
        index, _, leaf = name.removeprefix("attns.").partition(".")
        lepe = f"lepe.{index}." if branches == 2 else "lepe."
        return "attn." + leaf.replace("get_v.", lepe)
    return name


def check(module: nn.Module, case: dict, rename, grid=None) -> None:
    module.double().eval()
    stored = group(case, "param/") | group(case, "buffer/")
    state = {rename(k): v.double() for k, v in stored.items() if not k.endswith(".scale")}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all(name.endswith("num_batches_tracked") for name in missing)
    x = case["in/x"].double().requires_grad_()
    if grid is not None and not isinstance(module, SpatialReductionAttention):
        out = module(x.unflatten(1, grid)).flatten(1, 2)
    else:
        out = module(x) if grid is None else module(x, grid)
    out.backward(case["cotangent"].double())
    assert relative_error(out, case["out"]) < TOLERANCE
    assert relative_error(x.grad, case["grad/in/x"]) < TOLERANCE
    parameters = dict(module.named_parameters())
    for name, value in group(case, "grad/param/").items():
        assert relative_error(parameters[rename(name)].grad, value) < TOLERANCE, name


@pytest.mark.parametrize(
    "name", ["op_inline_cswin_block", "op_sla_cswin_block", "op_softmax_cswin_block"]
)
def test_cswin_block(name: str) -> None:
    description, case = load_vision(name)
    settings, grid = description["constructor"], tuple(description["grid"])
    dim, heads = settings["dim"], settings["num_heads"]
    branches = 1
    if "softmax" in name:
        branches = 2
        attn = CrossShapedWindowAttention(dim, heads, settings["split_size"])
    elif "inline" in name:
        attn = InLineAttention(dim, heads, grid=grid, lepe=True, raw_context=True)
    else:
        attn = SimplifiedLinearAttention(dim, heads, grid=grid, lepe=True)
    norm = norm_factory("prepbn" if "sla" in name else "ln", 1e-5)
    block = HierarchicalBlock(dim, attn, settings["mlp_ratio"], norm)
    check(block, case, partial(cswin_name, branches=branches), grid)


def test_pvt_block() -> None:
    description, case = load_vision("op_inline_pvt_block")
    settings, grid = description["constructor"], tuple(description["grid"])
    attn = InLineAttention(settings["dim"], settings["num_heads"], grid=grid, fused_qkv=False)
    norm = norm_factory("ln", description["layernorm_eps"])
    block = HierarchicalBlock(settings["dim"], attn, settings["mlp_ratio"], norm)
    check(block, case, our_name, grid)


def test_pvt_reduction_with_prepbn() -> None:
    description, case = load_vision("op_softmax_pvt_sr2")
    settings = description["constructor"]
    attn = SpatialReductionAttention(
        settings["dim"],
        settings["num_heads"],
        settings["sr_ratio"],
        norm_factory("prepbn", 1e-6),
        qkv_bias=settings["qkv_bias"],
    )
    check(attn, case, our_name, tuple(description["grid"]))


def test_eps_after_spatial_reduction_is_that_of_the_patch_embedding() -> None:
    eps = {}
    for name in ("pvt_tiny_slab", "pvt_tiny_inline"):
        model = create_small(name, attn="softmax", norm="ln")
        block = model.stages[0].blocks[0]
        eps[name] = (block.norm1.eps, block.attn.norm.eps, model.patch_embed.norm.eps)
    assert eps == {"pvt_tiny_slab": (1e-6,) * 3, "pvt_tiny_inline": (1e-6, 1e-5, 1e-5)}


def test_deit_block() -> None:
    description, case = load_vision("op_inline_deit_block")
    settings = description["constructor"]
    block = LinearViTBlock(
        settings["dim"],
        settings["num_heads"],
        kind="inline",
        grid=tuple(description["grid"]),
        num_prefix_tokens=1,
        qkv_bias=True,
        norm_layer=norm_factory("ln", description["layernorm_eps"]),
    )
    check(block, case, our_name)


@torch.no_grad()
def test_stripes_over_the_edge_hold_no_keys() -> None:
    """A map that stripes do not divide equals attention among the tokens that are there."""
    attn = CrossShapedWindowAttention(8, 2, split_size=3).double().eval()
    for conv in attn.lepe:
        conv.weight.zero_()
        conv.bias.zero_()
    grid = (4, 5)
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    q, k, v = (part.unflatten(1, grid) for part in attn.qkv(x).chunk(3, -1))
    expected = torch.zeros_like(q)
    for columns in (slice(0, 3), slice(3, 5)):
        part = [t[:, :, columns, :4].flatten(1, 2) for t in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*part)
        expected[:, :, columns, :4] = out.unflatten(1, (4, -1))
    for rows in (slice(0, 3), slice(3, 4)):
        part = [t[:, rows, :, 4:].flatten(1, 2) for t in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*part)
        expected[:, rows, :, 4:] = out.unflatten(1, (-1, 5))
    torch.testing.assert_close(attn(x, grid), attn.proj(expected.flatten(1, 2)))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"`num_heads` must divide dim 8 and be a multiple of 2"):
        CrossShapedWindowAttention(8, 1, split_size=2)
    attn = SpatialReductionAttention(8, 2, 4, norm_factory("ln", 1e-6))
    with pytest.raises(ValueError, match=r"`grid` must be at least sr_ratio 4 a side, got 2 x 9"):
        attn(torch.randn(1, 18, 8), (2, 9))
