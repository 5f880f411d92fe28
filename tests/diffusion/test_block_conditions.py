"""Conditions of all blocks at once: what blocks compute themselves, and when blocks have to."""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lintra.diffusion.models import block_conditions
from tiny_models import tiny_lit


@pytest.fixture
def launches(monkeypatch):
    """As on a GPU; the list of calls of `stacked_linear`."""
    calls = []

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return block_conditions_stacked_linear(*args, **kwargs)

    block_conditions_stacked_linear = block_conditions.stacked_linear
    monkeypatch.setattr(block_conditions, "on_gpu", lambda _: True)
    monkeypatch.setattr(block_conditions, "stacked_linear", recorded)
    return calls


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_lit().eval()


def predict(model, dtype=torch.float32, batch=3):
    generator = torch.Generator().manual_seed(1)
    size, classes = model.config.sample_size, model.config.num_embeds_ada_norm
    latents = torch.randn(batch, model.config.in_channels, size, size, generator=generator)
    steps = torch.randint(1000, (batch,), generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return model(latents.to(dtype), steps, labels).sample


def blockwise(model, monkeypatch, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(block_conditions, "on_gpu", lambda _: False)
        return predict(model, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_blocks(launches, model, monkeypatch, dtype):
    model.to(dtype)
    expected = blockwise(model, monkeypatch, dtype=dtype)
    assert not launches
    torch.testing.assert_close(predict(model, dtype), expected)
    assert len(launches) == 3
    predict(model, dtype)
    assert len(launches) == 6


@torch.no_grad()
def test_follows_weights(launches, model, monkeypatch):
    """Changed in place, moved, of another dtype, and replaced."""
    predict(model)
    linear = model.transformer_blocks[1].norm1.linear

    def change():
        linear.weight.mul_(2)

    def move():
        linear.weight.data = linear.weight.data * 3

    def replace():
        linear.bias = nn.Parameter(torch.ones_like(linear.bias))

    def replace_module():
        model.transformer_blocks[0].norm1.linear = copy.deepcopy(linear)

    for step in (change, move, replace, replace_module):
        before = predict(model)
        step()
        expected = blockwise(model, monkeypatch)
        assert not torch.equal(before, expected), step.__name__
        launches.clear()
        torch.testing.assert_close(predict(model), expected)
        assert len(launches) == 3, step.__name__
    model.half()
    torch.testing.assert_close(
        predict(model, torch.float16), blockwise(model, monkeypatch, dtype=torch.float16)
    )


def _hook(model):
    model.transformer_blocks[1].norm1.linear.register_forward_pre_hook(lambda *_: None)


def _hook_block(model):
    model.transformer_blocks[1].register_forward_hook(lambda *_: None)


def _backward_hook(model):
    model.transformer_blocks[1].norm1.linear.register_full_backward_hook(lambda *_: None)


def _backward_pre_hook(model):
    model.transformer_blocks[1].norm1.linear.register_full_backward_pre_hook(lambda *_: None)


def _own_drop(model):
    embedder = model.transformer_blocks[1].norm1.emb.class_embedder
    embedder.token_drop = lambda labels, ids=None: labels


def _sparse_table(model):
    """Whose gradient is another one."""
    model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.sparse = True


def _padding(model):
    model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.padding_idx = 3


def _own_forward(model):
    part = model.transformer_blocks[0].norm1.emb.timestep_embedder
    part.forward = type(part).forward.__get__(part)


def _subclass(model):
    class Adapted(nn.Linear):
        pass

    embedder = model.transformer_blocks[1].norm1.emb.timestep_embedder
    embedder.linear_2 = Adapted(embedder.linear_2.in_features, embedder.linear_2.out_features)


def _no_bias(model):
    model.transformer_blocks[1].norm1.linear.bias = None


def _drop_labels(model):
    """In one block and not in the other."""
    model.transformer_blocks[0].norm1.emb.class_embedder.train()


def _new_hooks(model):
    """As a recipe to remove all hooks does it."""
    linear = model.transformer_blocks[1].norm1.linear
    linear._forward_hooks = OrderedDict()
    linear.register_forward_hook(lambda *_: None)


def _post_act(model):
    model.transformer_blocks[0].norm1.emb.timestep_embedder.post_act = nn.Tanh()


def _wrapped(model):
    """Which answers for the block that it holds."""
    model.transformer_blocks[1] = checkpoint_wrapper(model.transformer_blocks[1])


def _plain_attributes(model):
    """As FSDP and DataParallel leave parameters."""
    for block in model.transformer_blocks:
        for linear in (m for m in block.norm1.modules() if isinstance(m, nn.Linear)):
            weight = linear.weight.detach()
            del linear.weight
            linear.weight = weight


def _other_width(model):
    """A second block whose time embedding is narrower inside."""
    embedder = model.transformer_blocks[1].norm1.emb.timestep_embedder
    embedder.linear_1 = nn.Linear(embedder.linear_1.in_features, 5)
    embedder.linear_2 = nn.Linear(5, embedder.linear_2.out_features)


CHANGES = [
    _hook, _hook_block, _backward_hook, _backward_pre_hook, _own_drop, _sparse_table, _padding,
    _own_forward, _subclass, _no_bias, _drop_labels,
    _new_hooks, _post_act, _wrapped, _plain_attributes, _other_width,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda x: x.__name__[1:])
def test_blocks_are_asked(launches, model, change, known):
    """Where calling the layers is more than their product, before or after the first pass."""
    if known:
        predict(model)
        assert len(launches) == 3
        launches.clear()
    change(model)
    predict(model)
    assert not launches


@torch.no_grad()
def test_sharded_weights_are_left_alone(launches, model):
    """FSDP with the original parameters keeps flat slices between its calls."""
    linear = model.transformer_blocks[1].norm1.linear
    linear.weight.data = linear.weight.data.flatten()[:7]
    features, labels = torch.randn(2, 256), torch.tensor([1, 2])
    assert model._conditions(model.transformer_blocks, features, labels) == [None, None]
    assert not launches


def test_replaced_weights_are_not_kept(launches, model):
    with torch.no_grad():
        predict(model)
    linear = model.transformer_blocks[0].norm1.linear
    old = weakref.ref(linear.weight)
    linear.weight = nn.Parameter(torch.zeros_like(linear.weight))
    predict(model)  # with gradients, as training would
    gc.collect()
    assert old() is None


@torch.no_grad()
def test_blocks_are_asked_with_many_samples(launches, model):
    predict(model, batch=block_conditions._MAX_BATCH + 1)
    assert not launches
    predict(model, batch=block_conditions._MAX_BATCH)
    assert len(launches) == 3


@torch.no_grad()
def test_blocks_are_asked_under_an_autocast_to_another_half(launches, model):
    """Which would round weights once more."""
    model.half()
    features, labels = torch.randn(2, 256), torch.tensor([1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model._conditions(model.transformer_blocks, features, labels) == [None, None]
    assert not launches


def step(model):
    """Prediction, and the gradients of all parameters."""
    model.zero_grad()
    out = predict(model)
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dropped", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_equals_blocks_in_training(launches, model, monkeypatch, autocast, dropped):
    model.train()
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = dropped

    def seeded():
        torch.manual_seed(2)  # a CPU draws for all blocks what it draws for each
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return step(model)

    with monkeypatch.context() as patch:
        patch.setattr(block_conditions, "on_gpu", lambda _: False)
        expected, gradients = seeded()
    assert not launches
    out, found = seeded()
    assert len(launches) == 3
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if autocast else {}
    torch.testing.assert_close(out, expected, **tolerance)
    for name, gradient in gradients.items():
        assert gradient.dtype == found[name].dtype == torch.float32
        size = gradient.abs().max() * (3e-2 if autocast else 1e-5) + 1e-12
        assert (found[name] - gradient).abs().max() <= size, name
    if dropped == 1:
        rows = found["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"]
        assert rows[-1].any()
        assert not rows[:-1].any()


def test_checkpoints_take_them(launches, model):
    """Blocks that are computed again are given what the others were."""
    model.train()
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    _, plain = step(model)
    model.enable_gradient_checkpointing()
    _, gradients = step(model)
    assert len(launches) == 6
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name])


def test_blocks_without_a_part_in_the_loss_learn_nothing(launches, model):
    """As where features of the first are all that counts."""
    seen = []
    model.transformer_blocks[0].attn1.register_forward_hook(lambda *args: seen.append(args[-1]))
    predict(model)
    seen[0].square().mean().backward()
    assert len(launches) == 3
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any("blocks.0.norm1" in name for name in names)
    assert not any("blocks.1." in name for name in names)


def test_frozen_blocks(launches, model):
    """As where only some blocks are trained."""
    model.requires_grad_(False)
    model.transformer_blocks[1].norm1.linear.weight.requires_grad_()
    _, gradients = step(model)
    assert len(launches) == 3
    assert [name for name, gradient in gradients.items() if gradient is not None] == [
        "transformer_blocks.1.norm1.linear.weight"
    ]


@torch.no_grad()
def test_meta_tensors(model):
    """A device without autocast."""
    model.to("meta")
    latents, steps = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, device="meta")
    labels = torch.empty(2, device="meta", dtype=torch.int64)
    assert model(latents, steps, labels).sample.shape == (2, 8, 8, 8)


@torch.no_grad()
def test_lora_on_a_modulation(launches, model):
    from peft import LoraConfig

    predict(model)
    plain = predict(model)
    model.add_adapter(
        LoraConfig(r=2, target_modules=["norm1.linear"], init_lora_weights=False), "lora"
    )
    launches.clear()
    assert not torch.equal(predict(model), plain)
    assert not launches
    model.delete_adapters("lora")


@torch.no_grad()
def test_copies_have_their_own(launches, model):
    out = predict(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.transformer_blocks[0].norm1.linear.weight.add_(1)
        assert torch.equal(predict(twin), out)
    assert not any("_conditions" in name for name in model.state_dict())


@torch.no_grad()
def test_compiled_blocks_take_them(launches, model, monkeypatch):
    from lintra.diffusion.compilation import compile_blocks

    expected = blockwise(model, monkeypatch)
    compile_blocks(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(model), expected)
    assert len(launches) == 3


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_gpu(dtype):
    from lintra.diffusion.models.transformer_lit import LiTTransformer2DModel

    torch.manual_seed(0)
    model = LiTTransformer2DModel(
        num_layers=4, num_attention_heads=4, attention_head_dim=64, sample_size=16
    )
    model.eval().to("cuda", dtype)
    for batch in (1, 32):
        latents = torch.randn(batch, 4, 16, 16, device="cuda", dtype=dtype)
        steps = torch.randint(1000, (batch,), device="cuda")
        labels = torch.randint(1001, (batch,), device="cuda")
        features = model.transformer_blocks[0].norm1.emb.time_proj(steps).to(dtype)
        together = model._conditions(model.transformer_blocks, features, labels)
        assert together[0] is not None
        for block, modulation in zip(model.transformer_blocks, together, strict=True):
            norm = block.norm1
            embedded = norm.emb.timestep_embedder(features) + norm.emb.class_embedder(labels)
            expected = norm.linear(norm.silu(embedded))
            torch.testing.assert_close(modulation, expected, rtol=2e-2, atol=2e-3)
        assert model(latents, steps, labels).sample.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_training_on_the_gpu(monkeypatch, autocast):
    from lintra.diffusion.models.transformer_lit import LiTTransformer2DModel

    torch.manual_seed(0)
    model = LiTTransformer2DModel(
        num_layers=4, num_attention_heads=4, attention_head_dim=64, sample_size=16
    )
    model.to("cuda")  # with labels that stay
    latents, labels = torch.randn(8, 4, 16, 16, device="cuda"), torch.arange(8, device="cuda")
    calls = []
    original = block_conditions.stacked_linear
    monkeypatch.setattr(
        block_conditions, "stacked_linear", lambda *a, **k: calls.append(1) or original(*a, **k)
    )

    def gradients():
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            out = model.eval()(latents, labels * 100, labels).sample
        out.float().square().mean().backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    found = gradients()
    assert len(calls) == 3
    assert (
        "StackedLinear"
        in type(
            model._conditions(model.transformer_blocks, torch.randn(8, 256, device="cuda"), labels)[
                0
            ].grad_fn
        ).__name__
    )
    calls.clear()
    monkeypatch.setattr(block_conditions, "on_gpu", lambda _: False)
    for name, expected in gradients().items():
        error = (found[name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < (5e-2 if autocast else 1e-4), name
    assert not calls
