"""LiT for text to image: what is linear, what stays, and what diffusers may do to it."""

import logging

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from torch.nn import functional as F

from lintra.diffusion import (
    LiTPixArtTransformer2DModel,
    assert_linear,
    load_pipeline,
    load_transformer,
    swap_transformer,
)
from lintra.diffusion.attention.linear import LiTAttention, LiTAttnProcessor
from lintra.diffusion.attention.prompt import PromptAttention
from lintra.diffusion.inheritance import POLICIES, inherit_weights
from lintra.diffusion.io import save_pipeline
from tiny_models import tiny_dit
from tiny_pixart import (
    prompt_inputs,
    sigma_images,
    sigma_pipeline,
    tiny_lit_pixart,
    tiny_pixart,
)


@pytest.fixture(scope="module")
def lit():
    return tiny_lit_pixart(num_linear_heads=2)


class _SquaredAttention(torch.nn.Module):
    """LiT's attention by its quadratic definition, from the parameters of a `LiTAttention`."""

    def __init__(self, attention: LiTAttention):
        super().__init__()
        self.attention = attention

    def forward(self, x, encoder_hidden_states=None, attention_mask=None):
        a, side = self.attention, int(x.shape[1] ** 0.5)
        q, k, v = (layer(x) for layer in (a.to_q, a.to_k, a.to_v))
        q, k, v_heads = (y.unflatten(-1, (a.heads, -1)).transpose(1, 2) for y in (q, k, v))
        weights = F.relu(q) @ F.relu(k).mT
        out = (weights / (weights.sum(-1, keepdim=True) + a.eps)) @ v_heads
        image = v.mT.unflatten(-1, (side, side))
        filters, bias = a.dwc.weight.repeat(a.heads, 1, 1, 1), a.dwc.bias.repeat(a.heads)
        local = F.conv2d(image, filters, bias, padding=2, groups=image.shape[1])
        return a.to_out[0](out.transpose(1, 2).flatten(2) + local.flatten(2).mT)


def test_is_pixart_with_another_self_attention(lit):
    pixart = tiny_pixart()
    pixart.load_state_dict(lit.state_dict(), strict=False)
    for theirs, ours in zip(pixart.transformer_blocks, lit.transformer_blocks, strict=True):
        theirs.attn1 = _SquaredAttention(ours.attn1)
    with torch.no_grad():
        torch.testing.assert_close(lit(**prompt_inputs()).sample, pixart(**prompt_inputs()).sample)


def test_cross_attention_keeps_the_donors_heads():
    student = LiTPixArtTransformer2DModel.from_teacher(tiny_pixart(), num_linear_heads=1)
    block = student.transformer_blocks[0]
    assert (block.attn1.heads, block.attn2.heads) == (1, 4)
    with torch.device("meta"):
        full = LiTPixArtTransformer2DModel(num_layers=1, caption_channels=4096)
    assert full.transformer_blocks[0].attn1.heads == 4
    assert full.transformer_blocks[0].attn2.heads == 16


def test_all_is_for_going_on_with_a_student():
    with pytest.raises(ValueError, match="the teacher lacks .*attn1.dwc.weight"):
        LiTPixArtTransformer2DModel.from_teacher(tiny_pixart(), "all")
    student = LiTPixArtTransformer2DModel.from_teacher(tiny_pixart())
    larger = LiTPixArtTransformer2DModel.from_config(student.config, sample_size=16)
    report = inherit_weights(larger, student, "all")
    assert set(report.inherited) == set(student.state_dict())
    for name, tensor in larger.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name


@pytest.mark.parametrize("policy", [None, *(name for name in POLICIES if name != "all")])
def test_inheritance(policy):
    pixart = tiny_pixart()
    student = LiTPixArtTransformer2DModel.from_teacher(pixart, policy)
    mine, theirs = student.state_dict(), pixart.state_dict()
    taken = POLICIES[policy or "with_out"]
    for name, tensor in mine.items():
        _, is_linear, rest = name.partition(".attn1.")
        expected = not is_linear or rest.startswith(taken)
        assert (name in theirs and torch.equal(tensor, theirs[name])) == expected, name


def test_the_student_may_continue_at_another_size():
    teacher = tiny_pixart(use_additional_conditions=None, sample_size=8)
    student = LiTPixArtTransformer2DModel.from_teacher(teacher, sample_size=128)
    # Unset, a sample size of 128 would ask for conditions that the teacher does not have.
    assert not student.use_additional_conditions
    assert student(**prompt_inputs()).sample.isfinite().all()


def test_alpha_with_resolution_conditions():
    widths = {"attention_head_dim": 12, "cross_attention_dim": 48}
    teacher = tiny_pixart(use_additional_conditions=True, **widths)
    student = LiTPixArtTransformer2DModel.from_teacher(teacher)
    sizes = {"resolution": torch.full((2, 2), 8.0), "aspect_ratio": torch.ones(2, 1)}
    out = student(**prompt_inputs(), added_cond_kwargs=sizes).sample
    sizes["resolution"] = 2 * sizes["resolution"]
    assert not torch.equal(out, student(**prompt_inputs(), added_cond_kwargs=sizes).sample)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (20, 4), (2, 2)])
def test_any_aspect_ratio(lit, height, width):
    out = lit(**prompt_inputs(height, width)).sample
    assert out.shape == (2, 8, height, width)
    assert out.isfinite().all()


def test_prompt_and_mask_matter(lit):
    out = lit(**prompt_inputs()).sample
    changed = prompt_inputs()
    changed["encoder_hidden_states"][1, 4] = 9.0  # masked
    torch.testing.assert_close(lit(**changed).sample, out)
    changed["encoder_hidden_states"][1, 0] = 9.0
    assert not torch.allclose(lit(**changed).sample[1], out[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(lit, dtype):
    half = tiny_lit_pixart(num_linear_heads=2).to(dtype)
    out = half(**prompt_inputs(dtype=dtype)).sample
    assert out.dtype == dtype
    exact = lit(**prompt_inputs()).sample
    assert (out.float() - exact).abs().max() <= 0.05 * exact.abs().max()


def test_every_parameter_learns():
    model = tiny_lit_pixart()
    model(**prompt_inputs()).sample.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for use in (False, True):
        model = tiny_lit_pixart().train()
        if use:
            model.enable_gradient_checkpointing()
        model(**prompt_inputs()).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_without_a_graph_break(lit):
    compiled = torch.compile(lit, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**prompt_inputs()).sample, lit(**prompt_inputs()).sample
        )


def test_blocks_do_not_warn_about_the_grid(lit, caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        lit(**prompt_inputs())
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_what_diffusers_does_keeps_it_linear(lit):
    model = tiny_lit_pixart(num_linear_heads=2)
    expected = lit(**prompt_inputs()).sample

    def check():
        assert_linear(model)
        assert all(isinstance(b.attn2, PromptAttention) for b in model.transformer_blocks)
        torch.testing.assert_close(model(**prompt_inputs()).sample, expected)

    model.set_default_attn_processor()
    assert isinstance(model.transformer_blocks[1].attn2.processor, AttnProcessor)
    check()
    model.fuse_qkv_projections()
    assert hasattr(model.transformer_blocks[0].attn1, "to_qkv")
    assert not hasattr(model.transformer_blocks[0].attn2, "to_kv")
    check()
    model.unfuse_qkv_projections()
    check()
    one = LiTAttnProcessor()
    model.set_attn_processor(one)
    assert all(block.attn1.processor is one for block in model.transformer_blocks)
    check()
    each = {
        name: LiTAttnProcessor() if "attn1" in name else AttnProcessor2_0()
        for name in model.attn_processors
    }
    model.set_attn_processor(each)
    assert len(each) == 4
    assert isinstance(model.transformer_blocks[0].attn2.processor, AttnProcessor2_0)
    check()


def test_processors_that_do_not_fit(lit):
    model = tiny_lit_pixart()
    with pytest.raises(ValueError, match="`processor` must be a LiTAttnProcessor or a dict .* Att"):
        model.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match="`processor` must be a LiTAttnProcessor, got AttnProc"):
        model.set_attn_processor({name: AttnProcessor2_0() for name in model.attn_processors})
    with pytest.raises(ValueError, match="`processor` must attend to a prompt, got a LiTAttnPro"):
        model.set_attn_processor({name: LiTAttnProcessor() for name in model.attn_processors})
    assert_linear(model)


def test_lora():
    model = tiny_lit_pixart()
    before = model(**prompt_inputs()).sample
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert not torch.allclose(model(**prompt_inputs()).sample, before)
    assert_linear(model)
    model.disable_adapters()
    torch.testing.assert_close(model(**prompt_inputs()).sample, before)


def test_save_and_load(tmp_path):
    model = tiny_lit_pixart(conv_kernel_size=3, conv_shared=False, linear_feature_map="elu1")
    model.save_pretrained(tmp_path)
    again = load_transformer(tmp_path)
    assert type(again) is LiTPixArtTransformer2DModel
    public = [{k: v for k, v in m.config.items() if k[0] != "_"} for m in (again, model)]
    assert public[0] == public[1]
    assert torch.equal(again(**prompt_inputs()).sample, model(**prompt_inputs()).sample)


def test_inside_a_sigma_pipeline(tmp_path):
    pipeline = sigma_pipeline(tiny_pixart())
    softmax = sigma_images(pipeline)
    swap_transformer(pipeline, LiTPixArtTransformer2DModel.from_teacher(pipeline.transformer))
    images = sigma_images(pipeline, 16, 24)
    assert images.shape == (2, 3, 16, 24)
    assert not torch.equal(sigma_images(pipeline), softmax)
    save_pipeline(pipeline, tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved")
    assert_linear(again.transformer)
    assert torch.equal(sigma_images(again, 16, 24), images)
    with pytest.raises(ValueError, match="`transformer` must fit .* caption_channels 6 != 12"):
        swap_transformer(pipeline, tiny_lit_pixart(caption_channels=6))


def test_state_dict_names_are_public(lit):
    theirs, mine = set(tiny_pixart().state_dict()), set(lit.state_dict())
    new = {f"transformer_blocks.{i}.attn1.dwc.{t}" for i in (0, 1) for t in ("weight", "bias")}
    assert mine - theirs == new
    assert theirs <= mine


def test_declares_its_blocks(lit):
    named = {
        "BasicTransformerBlock" if name == "LiTPixArtBlock" else name
        for name in LiTPixArtTransformer2DModel._no_split_modules
    }
    assert named == set(PixArtTransformer2DModel._no_split_modules)
    assert LiTPixArtTransformer2DModel._repeated_blocks == ["LiTPixArtBlock"]
    assert LiTPixArtTransformer2DModel._cp_plan is None


def test_without_cross_attention():
    model = tiny_lit_pixart(cross_attention_dim=None, caption_channels=None)
    x = prompt_inputs()
    assert model(x["hidden_states"], timestep=x["timestep"]).sample.isfinite().all()


def test_errors(lit):
    with pytest.raises(ValueError, match="`hidden_states` must have a height and width .* 8 x 9"):
        lit(**prompt_inputs(8, 9))
    with pytest.raises(ValueError, match="`encoder_hidden_states` must be prompt embeddings, got"):
        lit(**{**prompt_inputs(), "encoder_hidden_states": None})
    with pytest.raises(ValueError, match="`attention_mask` must be None"):
        lit(**prompt_inputs(), attention_mask=torch.ones(2, 16))
    with pytest.raises(ValueError, match="`attention_type` must be 'default', got 'gated'"):
        tiny_lit_pixart(attention_type="gated")
    with pytest.raises(ValueError, match="`heads` must divide the 32 channels, got 3"):
        tiny_lit_pixart(num_linear_heads=3)
    with pytest.raises(ValueError, match="`heads` must divide the 32 channels, got 0"):
        tiny_lit_pixart(num_linear_heads=0)
    with pytest.raises(ValueError, match="`teacher` must be a PixArt model, got a DiTTransformer"):
        LiTPixArtTransformer2DModel.from_teacher(tiny_dit())
    with pytest.raises(ValueError, match="`teacher` must fit the student, .* num_attention_heads"):
        LiTPixArtTransformer2DModel.from_teacher(tiny_pixart(), num_attention_heads=2)
