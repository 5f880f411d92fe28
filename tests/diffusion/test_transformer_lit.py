"""LiT as a diffusers model: definition, sizes, precisions, and what users of diffusers call."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch.nn import functional as F

from golden_cases import case_names, fill_tensor, load_case, noise_tensor, tokens_first
from lintra.diffusion import LiTPixArtTransformer2DModel, LiTTransformer2DModel, assert_linear
from lintra.diffusion.attention.linear import LiTAttention, LiTAttnProcessor
from lintra.diffusion.models.linear_blocks import default_num_linear_heads
from tiny_models import TINY, Nothing, inputs, tiny_dit, tiny_lit
from tiny_pixart import tiny_pixart


@pytest.fixture(scope="module")
def lit():
    return tiny_lit(num_linear_heads=2)


def test_default_heads_are_those_of_the_paper():
    widths = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
    assert [default_num_linear_heads(width) for width in widths.values()] == [2, 3, 4, 4]
    assert tiny_lit().transformer_blocks[0].attn1.heads == 1


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_channel"])
def test_attention_is_its_definition(shared):
    torch.manual_seed(3)
    attention = LiTAttention(12, heads=2, conv_kernel_size=3, conv_shared=shared).double()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = attention.to_q(x), attention.to_k(x), attention.to_v(x)
        q, k = F.relu(q).unflatten(-1, (2, 6)), F.relu(k).unflatten(-1, (2, 6))
        weights = torch.einsum("bihd,bjhd->bhij", q, k)
        weights = weights / (weights.sum(-1, keepdim=True) + attention.eps)
        expected = torch.einsum("bhij,bjhd->bihd", weights, v.unflatten(-1, (2, 6))).flatten(2)
        image = v.transpose(1, 2).reshape(2, 12, 4, 5)
        filters = attention.dwc.weight.repeat(2 if shared else 1, 1, 1, 1)
        bias = attention.dwc.bias.repeat(2 if shared else 1)
        local = F.conv2d(image, filters, bias, padding=1, groups=12).flatten(2).transpose(1, 2)
        expected = attention.to_out[0](expected + local)
        torch.testing.assert_close(attention(x, grid=(4, 5)), expected)


@pytest.mark.parametrize("name", case_names("C_relu_lit"))
def test_attention_is_the_measured_core(name):
    """The golden cores, which have a constant on the features, with projections left out."""
    description, stored = load_case(name)
    draw = [noise_tensor(description["inputs"][x], torch.float64) for x in ("q", "k", "v", "do")]
    heads = draw[0].shape[1]
    q, k, v, do = (tokens_first(x).flatten(2).requires_grad_() for x in draw)
    count, width = q.shape[1:]
    has_dwc = "_dwc" in name
    options = {"eps_features": 1e-6, "conv_kernel_size": 5 if has_dwc else 0}
    attention = LiTAttention(width, heads, **options).double().eval()
    attention.to_out[0] = torch.nn.Identity()
    for projection, tokens in ((attention.to_q, q), (attention.to_k, k), (attention.to_v, v)):
        projection.forward = lambda _, tokens=tokens: tokens
    leaves = {"dq": q, "dk": k, "dv": v}
    if has_dwc:
        attention.dwc.load_state_dict(
            {
                key: fill_tensor(description["parameters"][f"dwc.{key}"])
                for key in ("weight", "bias")
            }
        )
        leaves |= {"ddwc.weight": attention.dwc.weight, "ddwc.bias": attention.dwc.bias}
    grid = (5, 9) if count == 45 else (int(count**0.5), int(count**0.5))
    out = attention(torch.zeros_like(q), grid=grid)
    results = dict(zip(leaves, torch.autograd.grad(out, leaves.values(), do), strict=True))
    for key, expected in stored.items():
        if "dwc" not in key:
            expected = tokens_first(expected).flatten(2)
        result = out if key == "out" else results[key]
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cls", [LiTTransformer2DModel, LiTPixArtTransformer2DModel])
def test_a_constant_on_the_features(cls, tmp_path):
    model = cls(num_attention_heads=2, attention_head_dim=8, num_layers=1, linear_eps_features=1e-6)
    assert model.transformer_blocks[0].attn1.eps_features == 1e-6
    model.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).transformer_blocks[0].attn1.eps_features == 1e-6
    attention, x = LiTAttention(8, 2, conv_kernel_size=0, eps_features=1e-6), torch.randn(1, 5, 8)
    torch.nn.init.constant_(attention.to_q.bias, -100.0)  # no query has a positive channel
    assert attention(x).std() > 1e-3
    plain = LiTAttention(8, 2, conv_kernel_size=0)
    plain.load_state_dict(attention.state_dict())
    assert (plain(x) == plain.to_out[0].bias).all()
    with pytest.raises(ValueError, match="`eps_features` must not be negative, got -1"):
        LiTAttention(8, 2, eps_features=-1)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (4, 20), (2, 2)])
def test_any_size_that_the_patch_divides(lit, height, width):
    out = lit(**inputs(height, width)).sample
    assert out.shape == (2, 8, height, width)
    # Positions are those of the grid: a transposed input is not the transposed output.
    assert out.isfinite().all()


def test_native_size_equals_the_square_table_of_the_teacher():
    dit = tiny_dit()
    lit = LiTTransformer2DModel.from_teacher(dit)
    x = inputs()["hidden_states"]
    assert torch.equal(lit.pos_embed(x), dit.pos_embed(x))
    tall = torch.randn(1, 4, 12, 8)
    assert torch.equal(lit.pos_embed(tall), dit.pos_embed(tall))


def test_unpatchify_puts_patches_where_dit_puts_them():
    dit = tiny_dit()
    lit = LiTTransformer2DModel.from_teacher(dit, num_linear_heads=1)
    for block in (*dit.transformer_blocks, *lit.transformer_blocks):
        block.attn1 = Nothing()  # with the attention gone, the two models are one
    torch.testing.assert_close(lit(**inputs()).sample, dit(**inputs()).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(lit, dtype):
    half = tiny_lit(num_linear_heads=2).to(dtype)
    out = half(**inputs(dtype=dtype)).sample
    assert out.dtype == dtype
    assert out.isfinite().all()
    exact = lit(**inputs()).sample
    assert (out.float() - exact).abs().max() <= 0.05 * exact.abs().max()


def test_autocast(lit):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lit(**inputs()).sample.isfinite().all()


def test_every_parameter_learns():
    lit = tiny_lit()
    lit(**inputs()).sample.square().mean().backward()
    without = [n for n, p in lit.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for use in (False, True):
        lit = tiny_lit().train()
        for module in lit.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        if use:
            lit.enable_gradient_checkpointing()
        lit(**inputs()).sample.square().mean().backward()
        gradients.append([p.grad for p in lit.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_fused_projections_keep_the_output(lit):
    model = tiny_lit(num_linear_heads=2)
    model.fuse_qkv_projections()
    assert hasattr(model.transformer_blocks[0].attn1, "to_qkv")
    torch.testing.assert_close(model(**inputs()).sample, lit(**inputs()).sample)
    assert_linear(model)
    model.unfuse_qkv_projections()
    assert not hasattr(model.transformer_blocks[0].attn1, "to_qkv")


def test_attention_api(lit):
    model = tiny_lit()
    names = [f"transformer_blocks.{i}.attn1.processor" for i in range(2)]
    assert list(model.attn_processors) == names
    processor = LiTAttnProcessor()
    model.set_attn_processor(processor)
    assert all(value is processor for value in model.attn_processors.values())
    model.set_attn_processor({name: LiTAttnProcessor() for name in names})
    with pytest.raises(ValueError, match="`processor` must be a LiTAttnProcessor, got AttnP"):
        model.set_attn_processor(AttnProcessor2_0())
    before = model(**inputs()).sample
    model.set_attention_backend("native")  # chooses among softmax backends: nothing to choose here
    for attention in (block.attn1 for block in model.transformer_blocks):
        attention.set_attention_slice(1)  # nothing to slice either
    assert torch.equal(model(**inputs()).sample, before)
    assert_linear(model)


def test_lora():
    model = tiny_lit()
    before = model(**inputs()).sample
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    after = model(**inputs()).sample
    assert not torch.allclose(before, after)
    assert_linear(model)
    model.disable_adapters()
    torch.testing.assert_close(model(**inputs()).sample, before)


def test_hooks_on_modules_reach_every_weight(lit):
    # Both move a weight only while its own module's forward runs.
    casting = tiny_lit(num_linear_heads=2)
    casting.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert casting.transformer_blocks[0].attn1.dwc.weight.dtype == torch.float8_e4m3fn
    out, exact = casting(**inputs()).sample, lit(**inputs()).sample
    assert (out - exact).abs().max() <= 0.2 * exact.abs().max()
    offloaded = cpu_offload(tiny_lit(num_linear_heads=2), execution_device=torch.device("cpu"))
    assert offloaded.transformer_blocks[0].attn1.dwc.weight.device.type == "meta"
    torch.testing.assert_close(offloaded(**inputs()).sample, exact)


@torch.no_grad()
def test_a_hook_on_the_last_norm_is_heard(lit):
    hooked = tiny_lit(num_linear_heads=2)
    hooked.norm_out.register_forward_hook(lambda _, __, out: 0 * out)
    assert not torch.allclose(hooked(**inputs()).sample, lit(**inputs()).sample)


@torch.no_grad()
def test_the_dropout_is_called_where_it_may_do_something(lit):
    exact, model, seen = lit(**inputs()).sample, tiny_lit(num_linear_heads=2), []
    layers = model.transformer_blocks[0].attn1.to_out
    handle = layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model(**inputs()).sample, exact)
    assert seen
    handle.remove()
    layers[1].train().p = 0.9  # in a model in evaluation
    assert not torch.allclose(model(**inputs()).sample, exact)
    layers[1] = torch.nn.Tanh()
    assert not torch.allclose(model(**inputs()).sample, exact)


@torch.no_grad()
def test_one_condition_for_a_batch(lit):
    given = inputs()
    given |= {name: given[name][:1] for name in ("timestep", "class_labels")}
    expanded = {name: x.expand(2) if x.ndim == 1 else x for name, x in given.items()}
    torch.testing.assert_close(lit(**given).sample, lit(**expanded).sample)


def test_tuple_output_is_the_same(lit):
    assert torch.equal(lit(**inputs(), return_dict=False)[0], lit(**inputs()).sample)


def test_declares_its_blocks():
    block = type(tiny_lit().transformer_blocks[0]).__name__
    assert LiTTransformer2DModel._no_split_modules == [block]
    assert LiTTransformer2DModel._repeated_blocks == [block]
    assert LiTTransformer2DModel._cp_plan is None


@pytest.mark.parametrize(
    "arguments",
    [{}, {"torch_dtype": torch.bfloat16}, {"low_cpu_mem_usage": False}, {"device_map": "auto"}],
)
@pytest.mark.parametrize(
    ("cls", "tiny_stock"),
    [(LiTTransformer2DModel, tiny_dit), (LiTPixArtTransformer2DModel, tiny_pixart)],
)
def test_opens_a_stock_folder(cls, tiny_stock, arguments, tmp_path):
    """With the stock weights, and convolutions as new ones start."""
    stock = tiny_stock()
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(cls.from_pretrained(tmp_path, **arguments))
    assert_linear(models[0])
    assert models[0].dtype == arguments.get("torch_dtype", torch.float32)
    expected, other = stock.state_dict(), models[1].state_dict()
    for name, value in models[0].state_dict().items():
        if ".dwc." in name:
            assert 0 < value.abs().max() < 1
            assert torch.equal(value, other[name])
        else:
            assert torch.equal(value, expected[name].to(value.dtype))


def test_save_and_load(lit, tmp_path):
    model = tiny_lit(conv_kernel_size=3, conv_shared=False, linear_feature_map="elu1")
    model.save_pretrained(tmp_path)
    again = LiTTransformer2DModel.from_pretrained(tmp_path)
    public = [{k: v for k, v in m.config.items() if k[0] != "_"} for m in (again, model)]
    assert public[0] == public[1]
    assert torch.equal(again(**inputs()).sample, model(**inputs()).sample)


def test_without_the_convolution():
    model = tiny_lit(conv_kernel_size=0)
    assert model.transformer_blocks[0].attn1.dwc is None
    assert model(**inputs()).sample.shape == (2, 8, 8, 8)


def test_state_dict_names_are_public():
    names = {n.removeprefix("transformer_blocks.1.attn1.") for n in tiny_lit().state_dict()}
    expected = {
        f"{p}.{t}" for p in ("to_q", "to_k", "to_v", "to_out.0", "dwc") for t in ("weight", "bias")
    }
    assert {n for n in names if n.startswith(("to_", "dwc"))} == expected


def test_compiles_without_a_graph_break(lit):
    compiled = torch.compile(lit, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs()).sample, lit(**inputs()).sample)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_takes_every_dit_configuration(size):
    heads, dim, layers = {
        "S": (6, 64, 12),
        "B": (12, 64, 12),
        "L": (16, 64, 24),
        "XL": (16, 72, 28),
    }[size]
    config = {"num_attention_heads": heads, "attention_head_dim": dim, "num_layers": layers}
    with torch.device("meta"):
        model = LiTTransformer2DModel(**config, out_channels=8)
    attention = model.transformer_blocks[0].attn1
    assert heads * dim // attention.heads in (192, 256, 288)
    latents = torch.empty(1, 4, 32, 32, device="meta")
    step = torch.empty(1, dtype=torch.long, device="meta")
    assert model(latents, step, step).sample.shape == (1, 8, 32, 32)


def test_errors(lit):
    with pytest.raises(ValueError, match="`hidden_states` must have a height and width .* 8 x 9"):
        lit(**inputs(8, 9))
    with pytest.raises(ValueError, match="`heads` must divide the 32 channels, got 3"):
        LiTTransformer2DModel(**TINY, num_linear_heads=3)
    with pytest.raises(ValueError, match="`conv_kernel_size` must be odd, or 0 for none, got 4"):
        LiTTransformer2DModel(**TINY, conv_kernel_size=4)
    with pytest.raises(ValueError, match="`feature_map` must be one of"):
        tiny_lit(linear_feature_map="sine")
    attention, x = LiTAttention(8, 1), torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="`grid` must be .* got None"):
        attention(x)
    with pytest.raises(ValueError, match="`attention_mask` must be None"):
        attention(x, attention_mask=torch.ones(1, 4), grid=(2, 2))
    with pytest.raises(ValueError, match="`encoder_hidden_states` must be None"):
        attention(x, encoder_hidden_states=x, grid=(2, 2))
