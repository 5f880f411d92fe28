"""CLEAR's FLUX and SD3 against stock models with a dense mask, and what users of diffusers call."""

import accelerate
import pytest
import torch
from peft import LoraConfig

from lintra.diffusion import assert_linear
from lintra.diffusion.attention.local import ClearAttnProcessor
from tiny_clear import (
    CLEAR,
    NUM_LAYERS,
    STOCK,
    DenseOracle,
    clear_inputs,
    disc_mask,
    pooling_weights,
    tiny_clear,
    tiny_stock,
)

both = pytest.mark.parametrize("family", ["flux", "sd3"])


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, joint_attention_kwargs=kwargs or None).sample


@both
@pytest.mark.parametrize("num_text", [0, 1, 13])
@pytest.mark.parametrize("radius", [1, 4, 5.5])
def test_equals_the_stock_model_under_a_dense_mask(family, num_text, radius):
    inputs = clear_inputs(family, (9, 12), num_text=num_text)
    out = run(tiny_clear(family, radius), inputs)
    with DenseOracle(family, (9, 12), radius):
        torch.testing.assert_close(out, run(tiny_stock(family), inputs))


def test_equals_stock_flux_given_the_mask():
    inputs = clear_inputs("flux", (7, 10))
    expected = run(tiny_stock("flux"), inputs, attention_mask=disc_mask((7, 10), 4, 5))
    torch.testing.assert_close(run(tiny_clear("flux"), inputs), expected)
    assert (run(tiny_stock("flux"), inputs) - expected).abs().max() > 1e-2


@both
@pytest.mark.parametrize(("grid", "factor"), [((8, 12), 4), ((6, 9), 3)])
def test_pooled_keys(family, grid, factor):
    model = tiny_clear(family, down_factor=factor)
    inputs = clear_inputs(family, grid)
    weights = pooling_weights(model)
    assert len(weights) == NUM_LAYERS[family] + (family == "sd3")  # one has a second attention
    out = run(model, inputs)
    with DenseOracle(family, grid, 4, weights):
        torch.testing.assert_close(out, run(tiny_stock(family), inputs))
    assert not torch.allclose(out, run(tiny_clear(family), inputs), atol=1e-3)


@both
def test_a_radius_beyond_the_grid_is_the_stock_model(family):
    inputs = clear_inputs(family)
    torch.testing.assert_close(
        run(tiny_clear(family, 100), inputs), run(tiny_stock(family), inputs)
    )


@both
def test_sizes_do_not_remember_each_other(family):
    model = tiny_clear(family)
    for grid in ((5, 9), (9, 5), (5, 9), (16, 3), (1, 7), (7, 1)):
        inputs = clear_inputs(family, grid, batch=1)
        with DenseOracle(family, grid, 4):
            expected = run(tiny_stock(family), inputs)
        torch.testing.assert_close(run(model, inputs), expected)


@both
@pytest.mark.parametrize("factor", [None, 2])
def test_proportional_scale(family, factor):
    inputs = clear_inputs(family, (8, 6))
    plain = tiny_clear(family, down_factor=factor)
    out = run(tiny_clear(family, down_factor=factor, proportional_scale=True), inputs)
    torch.testing.assert_close(run(plain, inputs, proportional_scale=True), out)
    with DenseOracle(family, (8, 6), 4, pooling_weights(plain), proportional=True):
        torch.testing.assert_close(out, run(tiny_stock(family), inputs))
    assert (out - run(plain, inputs)).abs().max() > 1e-2


def test_ntk_factor():
    inputs = clear_inputs("flux", (9, 12))
    plain, scaled = tiny_clear("flux"), tiny_clear("flux", ntk_factor=10.0)
    stock = tiny_stock("flux")
    stock.pos_embed.theta = 100000
    with DenseOracle("flux", (9, 12), 4):
        expected = run(stock, inputs)
    torch.testing.assert_close(run(scaled, inputs), expected)
    torch.testing.assert_close(run(plain, inputs, ntk_factor=10), expected)
    torch.testing.assert_close(run(scaled, inputs, ntk_factor=1), run(plain, inputs))
    assert (run(plain, inputs) - expected).abs().max() > 1e-2


@both
def test_radius_of_one_call(family):
    inputs = clear_inputs(family)
    torch.testing.assert_close(
        run(tiny_clear(family), inputs, radius=6), run(tiny_clear(family, 6), inputs)
    )


def test_grid_from_the_call():
    model, inputs = tiny_clear("flux"), clear_inputs("flux", (6, 10))
    expected = run(model, inputs)
    torch.testing.assert_close(run(model, inputs, spatial_shape=(6, 10)), expected)
    kwargs = {"spatial_shape": [6, 10], "scale": 1.0}
    with torch.no_grad():
        model(**inputs, joint_attention_kwargs=kwargs)
    assert kwargs == {"spatial_shape": [6, 10], "scale": 1.0}
    # Ids that are no grid only rotate then.
    inputs["img_ids"] = torch.randn(60, 3)
    stock = run(tiny_stock("flux"), inputs, attention_mask=disc_mask((6, 10), 4, 5))
    torch.testing.assert_close(run(model, inputs, spatial_shape=(6, 10)), stock)


def test_ids_of_a_long_side_survive_half_precision():
    model = tiny_clear("flux", radius=3)
    inputs = clear_inputs("flux", (2, 300), batch=1)
    expected = run(model, inputs)
    for dtype in (torch.bfloat16, torch.float16):
        for kwargs in ({}, {"spatial_shape": (2, 300)}):
            rounded = {**inputs, "img_ids": inputs["img_ids"].to(dtype)}
            assert torch.equal(run(model, rounded, **kwargs), expected)


@both
@pytest.mark.parametrize("layers", [(0,), (1, 2)])
def test_full_attention_layers(family, layers):
    model = tiny_clear(family, full_attention_layers=layers, down_factor=3)
    names = model.attention_layer_names()
    full = [name for name, is_full in names.items() if is_full]
    assert len(pooling_weights(model)) == len(names) - len(full)
    processors = {n.removesuffix(".processor"): p for n, p in model.attn_processors.items()}
    assert [name for name in names if processors[name].full_attention] == full
    assert_linear(model)
    assert_linear(torch.nn.ModuleDict({"transformer": model}))
    everything = tiny_clear(family, full_attention_layers=range(NUM_LAYERS[family]))
    inputs = clear_inputs(family)
    torch.testing.assert_close(run(everything, inputs), run(tiny_stock(family), inputs))
    model.set_attention_backend("_native_math")
    backend = processors[full[0]]._attention_backend
    assert backend.value == "_native_math"


def test_single_blocks_are_counted_after_double_blocks():
    names = tiny_clear("flux", full_attention_layers=[1, 2]).attention_layer_names()
    assert [name for name, full in names.items() if full] == [
        "transformer_blocks.1.attn", "single_transformer_blocks.0.attn",
    ]  # fmt: skip


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_that_of_the_stock_model(family, dtype):
    model, stock, grid = tiny_clear(family, down_factor=3), tiny_stock(family), (9, 12)
    weights, inputs = pooling_weights(model), clear_inputs(family, grid)
    exact = run(model, inputs)
    out = run(model.to(dtype), clear_inputs(family, grid, dtype=dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()
    with DenseOracle(family, grid, 4, weights):
        reference = run(stock.to(dtype), clear_inputs(family, grid, dtype=dtype))
    error, allowed = ((x.float() - exact).square().mean().sqrt() for x in (out, reference))
    assert error <= 2 * allowed


@both
def test_autocast(family):
    model = tiny_clear(family, down_factor=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(model, clear_inputs(family)).isfinite().all()


@both
def test_gradients(family):
    """Those of the stock model under a dense mask, with and without gradient checkpointing."""
    inputs, grid = clear_inputs(family, (6, 8)), (6, 8)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_clear(family, down_factor=2).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    weights = pooling_weights(tiny_clear(family, down_factor=2))
    stock = tiny_stock(family)
    with DenseOracle(family, grid, 4, weights):
        stock(**inputs).sample.square().mean().backward()
    expected = {name: p.grad for name, p in stock.named_parameters()}
    pooled = [name for name in gradients[0] if name not in expected]
    for weight, name in zip(weights, pooled, strict=True):
        expected[name] = weight.grad
    for name, gradient in expected.items():
        for ours in gradients:
            torch.testing.assert_close(ours[name], gradient, msg=name)


@both
def test_fused_projections_keep_the_output(family):
    model, inputs = tiny_clear(family), clear_inputs(family)
    names, expected = set(model.state_dict()), run(model, inputs)
    model.fuse_qkv_projections()
    assert any("to_qkv" in name for name in model.state_dict())
    query = model.transformer_blocks[0].attn.to_q.weight
    saved = query.detach().clone()
    torch.nn.init.zeros_(query)  # not used any more
    torch.testing.assert_close(run(model, inputs), expected)
    assert_linear(model)
    query.data.copy_(saved)
    model.unfuse_qkv_projections()
    assert set(model.state_dict()) == names
    torch.testing.assert_close(run(model, inputs), expected)
    assert_linear(model)


@both
def test_lora(family):
    model, inputs = tiny_clear(family, down_factor=3), clear_inputs(family)
    before = run(model, inputs)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    after = run(model, inputs)
    assert not torch.allclose(before, after)
    assert_linear(model)
    model.disable_adapters()
    torch.testing.assert_close(run(model, inputs), before)
    model.enable_adapters()
    model.fuse_lora()
    torch.testing.assert_close(run(model, inputs), after)


@both
def test_the_stock_state_dict_fits(family):
    model = CLEAR[family](**STOCK[family][1], radius=4, down_factor=4)
    stock = tiny_stock(family).state_dict()
    model.load_state_dict(stock)
    names = set(model.state_dict()) - set(stock)
    assert names == {f"{name}.processor.spatial_weight" for name in model.attention_layer_names()}
    for weight in pooling_weights(model):
        assert weight.shape == (1, 1, 1, 4, 1, 4, 1)
        assert (weight == 1 / 16).all()


@both
@pytest.mark.parametrize("down_factor", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opens_a_stock_folder(family, down_factor, dtype, tmp_path):
    tiny_stock(family).save_pretrained(tmp_path)
    model = CLEAR[family].from_pretrained(
        tmp_path, radius=6, down_factor=down_factor, torch_dtype=dtype
    )
    assert (model.config.radius, model.config.down_factor) == (6, down_factor)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all((w == torch.tensor(1 / 9, dtype=dtype)).all() for w in pooling_weights(model))
    assert not any(p.is_meta for p in model.parameters())
    eager = CLEAR[family].from_pretrained(
        tmp_path, down_factor=down_factor, torch_dtype=dtype, low_cpu_mem_usage=False
    )
    placed = CLEAR[family].from_pretrained(
        tmp_path, down_factor=down_factor, torch_dtype=dtype, device_map={"": "cpu"}
    )
    for name, parameter in model.named_parameters():
        # diffusers leaves some of SD3's parameters in float32 here
        assert torch.equal(eager.get_parameter(name).to(dtype), parameter)
        assert torch.equal(placed.get_parameter(name), parameter)
    if dtype == torch.float32:
        inputs, teacher = clear_inputs(family), tiny_stock(family)
        other = CLEAR[family].from_teacher(teacher, radius=6, down_factor=down_factor)
        torch.testing.assert_close(run(model, inputs), run(other, inputs))


@both
def test_opens_a_single_file(family, tmp_path):
    stock = tiny_stock(family)
    stock.save_pretrained(tmp_path)
    file = str(tmp_path / "diffusion_pytorch_model.safetensors")
    model = CLEAR[family].from_single_file(file, config=str(tmp_path), radius=4)
    assert_linear(model)
    inputs = clear_inputs(family)
    torch.testing.assert_close(model(**inputs).sample, tiny_clear(family)(**inputs).sample)
    pooled = CLEAR[family].from_teacher(model, down_factor=3)
    expected = CLEAR[family].from_teacher(stock, radius=4, down_factor=3)
    torch.testing.assert_close(pooled(**inputs).sample, expected(**inputs).sample)


@both
def test_save_and_load(family, tmp_path):
    changes = {"down_factor": 3, "proportional_scale": True, "full_attention_layers": [1]}
    model = tiny_clear(family, **changes)
    model.save_pretrained(tmp_path)
    again = CLEAR[family].from_pretrained(tmp_path)
    public = [{k: v for k, v in m.config.items() if k[0] != "_"} for m in (again, model)]
    assert {**public[0]} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in public[1].items()
    }
    assert torch.equal(run(again, clear_inputs(family)), run(model, clear_inputs(family)))
    assert_linear(again)


@both
def test_from_teacher_shares_every_tensor(family):
    teacher = tiny_stock(family).to(torch.bfloat16)
    student = CLEAR[family].from_teacher(teacher, radius=5, down_factor=3)
    mine = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        assert mine[name].data_ptr() == tensor.data_ptr()
    assert not student.training
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert not any(t.is_meta for t in (*student.parameters(), *student.buffers()))
    mean = torch.tensor(1 / 9, dtype=torch.bfloat16)
    assert all((weight == mean).all() for weight in pooling_weights(student))
    inputs = clear_inputs(family, dtype=torch.bfloat16)
    assert run(student, inputs).isfinite().all()
    # A CLEAR model teaches too; its kernels are taken where they fit.
    again = CLEAR[family].from_teacher(student, radius=7)
    assert again.config.radius == 7
    assert pooling_weights(again)[0].data_ptr() == pooling_weights(student)[0].data_ptr()
    assert pooling_weights(CLEAR[family].from_teacher(student, down_factor=None)) == []
    other = CLEAR[family].from_teacher(student, down_factor=2)
    assert (pooling_weights(other)[0] == 0.25).all()


def test_from_teacher_brings_buffers_that_are_not_saved():
    teacher = tiny_stock("sd3", pos_embed_max_size=None)
    assert "pos_embed.pos_embed" not in teacher.state_dict()
    student = CLEAR["sd3"].from_teacher(teacher, radius=100)
    inputs = clear_inputs("sd3", (8, 8))
    torch.testing.assert_close(run(student, inputs), run(teacher, inputs))


@both
def test_sequential_offload(family):
    model, inputs = tiny_clear(family, down_factor=3), clear_inputs(family)
    expected = run(model, inputs)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(weight.is_meta for weight in pooling_weights(model))
    torch.testing.assert_close(run(model, inputs), expected)


@both
def test_compiles_without_a_graph_break(family):
    model, inputs = tiny_clear(family, down_factor=3), clear_inputs(family)
    kwargs = {"spatial_shape": (9, 12)}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        out = compiled(**inputs, joint_attention_kwargs=kwargs).sample
    torch.testing.assert_close(out, run(model, inputs))


@both
def test_declares_its_blocks(family):
    model = tiny_clear(family)
    blocks = {type(b).__name__ for name in model._block_lists for b in getattr(model, name)}
    assert set(model._repeated_blocks) == set(model._no_split_modules) == blocks
    assert model._cp_plan is None


@pytest.mark.parametrize("size", [(19, 38), (8, 24)])
def test_takes_the_flux_configuration(size):
    with torch.device("meta"):
        model = CLEAR["flux"](num_layers=size[0], num_single_layers=size[1], guidance_embeds=True)
    assert len(model.attention_layer_names()) == sum(size)
    if size == (19, 38):
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 11901


def test_processors_are_free_of_state():
    model = tiny_clear("flux")
    processors = [ClearAttnProcessor(), *model.attn_processors.values()]
    assert all(list(processor.parameters()) == [] for processor in processors)
    before = [str(vars(processor)) for processor in processors]
    run(model, clear_inputs("flux"))
    assert [str(vars(processor)) for processor in processors] == before
