"""Blocks of LiT and of LiT for text to image: what they compute, by what, and who may look on."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers import FirstBlockCacheConfig, LayerSkipConfig, apply_first_block_cache
from diffusers.hooks import apply_layer_skip
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import nn

from kernel_checks import DEVICE, on_gpu_or_interpreted
from lintra.diffusion import LiTPixArtTransformer2DModel, LiTTransformer2DModel
from lintra.kernels.ada_layer_norm import api, configs
from tiny_models import Nothing, inputs, tiny_dit, tiny_lit
from tiny_pixart import prompt_inputs, tiny_lit_pixart, tiny_pixart


class Kind(NamedTuple):
    """A linear model with its blocks, and the softmax model whose blocks they were."""

    cls: type
    ours: Callable[..., nn.Module]
    theirs: Callable[..., nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    norms: tuple[str, str]
    # Calls of norms and sums by a model of two blocks.
    calls: int


KINDS = {
    # A sum between two blocks is part of the norm after it; the output has a norm too.
    "lit": Kind(LiTTransformer2DModel, tiny_lit, tiny_dit, inputs, ("norm1.norm", "norm3"), 6),
    "pixart": Kind(
        LiTPixArtTransformer2DModel, tiny_lit_pixart, tiny_pixart, prompt_inputs,
        ("norm1", "norm2"), 8,
    ),
}  # fmt: skip


@pytest.fixture(params=list(KINDS))
def kind(request):
    return KINDS[request.param]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_keep_their_channels_side_by_side(kind, batch):
    """The convolution of the patches does not; any other layout slows every pass down."""
    model, seen = kind.ours(), []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda _, given, out: seen.append(out))
        block.attn1.register_forward_hook(lambda _, given, out: seen.extend([given[0], out]))
    model(**{name: x[:batch] for name, x in kind.inputs().items()})
    assert [tokens.stride() for tokens in seen] == [(16 * 32, 32, 1)] * 6


@torch.no_grad()
def test_weights_of_a_norm_count(kind):
    donor = kind.theirs(norm_elementwise_affine=True)
    model = kind.cls.from_teacher(donor, num_linear_heads=1)
    for block in (*donor.transformer_blocks, *model.transformer_blocks):
        block.attn1 = Nothing()
        weight = block.get_submodule(kind.norms[1]).weight
        nn.init.constant_(weight, 0.5)
    outputs = [x(**kind.inputs()).sample for x in (model, donor)]
    torch.testing.assert_close(*outputs)
    for x in (model, donor):
        x.norm_out = nn.Tanh()
        for block in x.transformer_blocks:
            for name in kind.norms:
                block.set_submodule(name, nn.Tanh())
    others = [x(**kind.inputs()).sample for x in (model, donor)]
    torch.testing.assert_close(*others)
    assert not torch.allclose(others[0], outputs[0])


@torch.no_grad()
def test_a_hook_on_a_norm_is_heard(kind):
    model = kind.ours()
    exact = model(**kind.inputs()).sample
    for name in kind.norms:
        norm = model.transformer_blocks[1].get_submodule(name)
        handle = norm.register_forward_hook(lambda module, given, out: 3 * out)
        assert not torch.allclose(model(**kind.inputs()).sample, exact)
        handle.remove()


@on_gpu_or_interpreted
@torch.no_grad()
def test_norms_and_sums_by_kernels(kind, monkeypatch):
    monkeypatch.setattr(configs, "GATED_ADD_MIN_ELEMENTS", 1)
    model, given = kind.ours().to(DEVICE), {k: v.to(DEVICE) for k, v in kind.inputs().items()}
    outputs = []
    for takes in (False, True):
        calls = []

        def takes_kernel(impl, x, reason, takes=takes, calls=calls):
            calls.append(reason)
            return takes

        monkeypatch.setattr(api, "takes_kernel", takes_kernel)
        outputs.append(model(**given).sample)
        assert calls == [None] * kind.calls
    torch.testing.assert_close(*outputs)


@torch.no_grad()
def test_caches_and_skips_of_diffusers_know_them(kind):
    model = kind.ours(num_linear_heads=2)
    exact, other = model(**kind.inputs()).sample, kind.inputs()
    other["hidden_states"] = other["hidden_states"] + 0.1
    cached = kind.ours(num_linear_heads=2)
    apply_first_block_cache(cached, FirstBlockCacheConfig(threshold=1e9))
    _set_cache_context(cached, CacheContext("one"))
    torch.testing.assert_close(cached(**kind.inputs()).sample, exact)
    calls = []
    cached.transformer_blocks[1].attn1.register_forward_hook(lambda *_: calls.append(1))
    assert not torch.allclose(cached(**other).sample, model(**other).sample)
    assert not calls

    skipping = kind.ours(num_linear_heads=2)
    apply_layer_skip(skipping, LayerSkipConfig(indices=[0], fqn="transformer_blocks"))
    assert not torch.allclose(skipping(**kind.inputs()).sample, exact)
    scores = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    config = LayerSkipConfig(indices=[0], fqn="transformer_blocks", **scores)
    with pytest.raises(ValueError, match="LiTAttnProcessor'> not registered"):
        apply_layer_skip(kind.ours(), config)  # there are no scores: it would do nothing


@torch.no_grad()
def test_arguments_of_a_block_of_pixart():
    theirs, ours = (make().transformer_blocks[0] for make in (tiny_pixart, tiny_lit_pixart))
    for block in (theirs, ours):
        block.attn1 = Nothing()
    ours.load_state_dict(theirs.state_dict())
    tokens, prompt, time = torch.randn(2, 16, 32), torch.randn(2, 5, 32), torch.randn(2, 6 * 32)
    given = {"encoder_hidden_states": prompt, "timestep": time, "added_cond_kwargs": {}}
    torch.testing.assert_close(ours(tokens, **given), theirs(tokens, **given))
    with pytest.raises(ValueError, match="`timestep` must be"):
        ours(tokens, encoder_hidden_states=prompt)
