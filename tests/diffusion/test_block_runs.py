"""Blocks of LiT compiled a few to a graph: how many graphs, what they keep, when they give way."""

import copy
import gc
import pickle
from importlib import import_module

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.decomposition import select_decomp_table
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lintra.diffusion.compilation import compile_blocks
from lintra.diffusion.models import block_runs
from lintra.diffusion.models.lit_block import LiTBlock
from lintra.kernels._common.kernel_call import KernelCall
from tiny_models import tiny_lit


def arguments_of(model, batch=2):
    generator = torch.Generator().manual_seed(1)
    size, classes = model.config.sample_size, model.config.num_embeds_ada_norm
    latents = torch.randn(batch, model.config.in_channels, size, size, generator=generator)
    steps = torch.randint(1000, (batch,), generator=generator)
    return latents, steps, torch.randint(classes, (batch,), generator=generator)


def predict(model):
    with torch.no_grad():
        return model(*arguments_of(model)).sample


def compiled(model, backend="eager"):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    model = copy.deepcopy(model)
    compile_blocks(model, backend=counter, fullgraph=True)
    return model, counter


@pytest.mark.parametrize(("blocks", "length"), [(1, 1), (2, 2), (6, 3), (7, 1), (12, 4), (28, 4)])
def test_runs_of_a_model_have_one_length(blocks, length):
    assert block_runs._length(blocks) == length


@pytest.mark.parametrize(("blocks", "calls"), [(8, 2), (6, 2), (5, 5)])
def test_one_graph_serves_all_runs(blocks, calls, monkeypatch):
    plain = tiny_lit(num_layers=blocks)
    expected = predict(plain)
    model, counter = compiled(plain)
    runs, run = [], model._runs._compiled
    monkeypatch.setattr(model._runs, "_compiled", lambda *x: runs.append(len(x[0])) or run(*x))
    for _ in range(2):
        torch.testing.assert_close(predict(model), expected)
    assert counter.frame_count == 1
    assert runs == [blocks // calls] * 2 * calls


@pytest.mark.parametrize("touch", ["hook", "pre-hook", "forward", "class", "wrapper"])
def test_blocks_that_are_more_than_their_forward_are_called(touch, monkeypatch):
    plain = tiny_lit(num_layers=4)
    expected = predict(plain)
    model, _ = compiled(plain)
    monkeypatch.setattr(block_runs, "_run", lambda *_: pytest.fail("ran"))
    model.compile_runs(backend="eager")
    called, block = [], model.transformer_blocks[2]
    if touch == "hook":
        block.register_forward_hook(lambda *_: called.append(1))
    elif touch == "pre-hook":
        block.register_forward_pre_hook(lambda *_: called.append(1))
    elif touch == "forward":
        forward = block.forward
        block.forward = lambda *x: called.append(1) or forward(*x)
    elif touch == "class":
        forward = LiTBlock.forward
        monkeypatch.setattr(LiTBlock, "forward", lambda *x: called.append(1) or forward(*x))
    else:
        model.transformer_blocks[2] = checkpoint_wrapper(block)
        called.append(1)
    torch.testing.assert_close(predict(model), expected)
    assert called


def without_label_dropout(model):
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model.train()


def gradients(model):
    model.zero_grad()
    model(*arguments_of(model)).sample.square().mean().backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def test_trains_and_checkpoints_single_blocks(monkeypatch):
    plain = without_label_dropout(tiny_lit(num_layers=4))
    model, counter = compiled(plain)
    monkeypatch.setattr(model._runs, "_compiled", lambda *_: pytest.fail("ran"))
    expected = gradients(plain)
    torch.testing.assert_close(gradients(model), expected)
    assert counter.frame_count == 1
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(model), expected)


def test_blocks_in_a_row_are_blocks_one_by_one():
    model = without_label_dropout(tiny_lit(num_layers=3))
    in_a_row = predict(model), gradients(model)
    called = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close((predict(model), gradients(model)), in_a_row)
    assert len(called) == 6


@pytest.mark.parametrize("name", ["", "norm1.norm", "norm3"])
@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_on_gradients_are_heard(hook, name):
    model, called = without_label_dropout(tiny_lit(num_layers=3)), []
    expected = gradients(model)
    getattr(model.transformer_blocks[1].get_submodule(name), hook)(lambda *_: called.append(1))
    torch.testing.assert_close(gradients(model), expected)
    assert called == [1]


def test_hooks_on_all_gradients_are_heard():
    model, called = without_label_dropout(tiny_lit(num_layers=2)), []
    expected = gradients(model)
    every_module = torch.nn.modules.module
    handle = every_module.register_module_full_backward_hook(lambda x, *_: called.append(type(x)))
    torch.testing.assert_close(gradients(model), expected)
    handle.remove()
    assert called.count(LiTBlock) == 2
    assert called.count(torch.nn.LayerNorm) == 5


@torch.no_grad()
def test_no_parts_of_a_sum_outlive_it():
    """As many tensors of tokens as when blocks are called, and no more."""

    def alive(model):
        shape, counts = (2, 16, 32), []

        def count(*_):
            gc.collect()
            objects = [x for x in gc.get_objects() if type(x) is torch.Tensor]
            counts.append(len({x.data_ptr() for x in objects if x.shape == shape}))

        model.transformer_blocks[1].attn1.register_forward_hook(count)
        predict(model)
        return counts

    called = tiny_lit(num_layers=3)
    called.transformer_blocks[0].register_forward_hook(lambda *_: None)
    assert alive(tiny_lit(num_layers=3)) == alive(called)


def test_blocks_that_are_compiled_by_themselves_are_called():
    plain = tiny_lit(num_layers=3)
    expected = predict(plain)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    plain.compile_repeated_blocks(backend=counter)
    torch.testing.assert_close(predict(plain), expected)
    assert counter.frame_count == 1


def test_copies_are_not_compiled_and_know_no_other_names():
    model, counter = compiled(tiny_lit())
    names = list(tiny_lit().state_dict())
    assert list(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(predict(other), predict(tiny_lit()))
    assert counter.frame_count == 0


def test_a_whole_graph_has_no_runs_in_it():
    model, _ = compiled(tiny_lit(num_layers=4))
    model.compile_runs(backend="eager")
    expected = predict(tiny_lit(num_layers=4))
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(whole), expected)


def test_training_keeps_what_gradients_need(monkeypatch):
    """And not the sum that a norm takes, which follows from others: DiT has as much, or more."""
    kept = []

    def forward(graph, _):
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        nodes = {x for x in torch.utils._pytree.tree_leaves(output.args) if x is not None}
        values = [x.meta.get("val") for x in nodes if x.op != "placeholder"]
        kept.extend(x.numel() for x in values if isinstance(x, torch.Tensor))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    for name in ("linear_attention", "token_conv"):  # as on a GPU, but nothing is launched
        api = import_module(f"lintra.kernels.{name}.api")
        monkeypatch.setattr(api, "why_no_kernel", lambda _: None)
        monkeypatch.setattr(api, "takes_kernel", lambda _impl, _x, reason: reason is None)
    monkeypatch.setattr(KernelCall, "__call__", lambda *_: None)
    torch._dynamo.reset()
    model = tiny_lit(num_layers=4, attention_head_dim=64, sample_size=32).train()
    compile_blocks(model, backend=backend, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        model(*arguments_of(model, batch=4))
    tokens = 4 * 16 * 16 * 128
    # Queries, keys, values; the inputs of three linear maps; two results that a gate multiplies;
    # four times as much before and after the GELU; and the result, the next block's input.
    # One graph for all blocks.
    assert sum(x for x in kept if x >= tokens) == (3 + 3 + 2 + 4 + 4 + 1) * tokens
