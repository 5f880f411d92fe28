"""What a student takes of its teacher, and what stops it."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from lintra.diffusion import (
    LiTTransformer2DModel,
    OfficialDiTTransformer2DModel,
    PixelAutoencoder,
    inherit_weights,
)
from lintra.diffusion.inheritance import POLICIES
from tiny_models import TINY, inputs, randomize, tiny_dit, tiny_lit


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "all"])
def test_report_tells_what_happened(policy):
    dit, lit = tiny_dit(), tiny_lit()
    before = {name: tensor.clone() for name, tensor in lit.state_dict().items()}
    lit = LiTTransformer2DModel(**{k: v for k, v in lit.config.items() if k[0] != "_"})
    report = inherit_weights(lit, dit, policy)
    mine, theirs = lit.state_dict(), dit.state_dict()
    assert set(report.inherited) | set(report.initialized) == set(mine) == set(before)
    for name, shape in report.inherited.items():
        assert torch.equal(mine[name], theirs[name])
        assert shape == tuple(mine[name].shape)
    taken = {f"{projection}." for projection in POLICIES[policy]}
    fresh = {name for name in mine if ".attn1." in name and not any(t in name for t in taken)}
    assert set(report.initialized) == fresh
    assert set(report.left_out) == {name for name in fresh if ".dwc." not in name}
    assert all(any(projection in name for name in report.inherited) for projection in taken)
    text = str(report)
    assert policy in text
    assert "transformer_blocks.*.attn1.dwc.weight (32, 1, 5, 5)" in text


def test_from_teacher():
    dit = tiny_dit().to(torch.bfloat16)
    lit = LiTTransformer2DModel.from_teacher(dit, "with_projections", num_linear_heads=2)
    assert lit.dtype == torch.bfloat16
    assert not lit.training
    assert lit.transformer_blocks[0].attn1.heads == 2
    assert lit(**inputs(dtype=torch.bfloat16)).sample.shape == (2, 8, 8, 8)
    assert dit.state_dict()["proj_out_2.weight"].equal(lit.state_dict()["proj_out_2.weight"])


def test_a_lit_may_teach_another():
    teacher = tiny_lit(num_linear_heads=1)
    student = LiTTransformer2DModel.from_teacher(teacher, num_linear_heads=4, conv_kernel_size=3)
    assert student.transformer_blocks[0].attn1.heads == 4
    assert student.proj_out_2.weight.equal(teacher.proj_out_2.weight)


def test_the_time_frequencies_are_the_teachers():
    official = OfficialDiTTransformer2DModel(**TINY)
    assert LiTTransformer2DModel.from_teacher(official).config.time_freq_shift == 0.0
    assert LiTTransformer2DModel.from_teacher(tiny_dit()).config.time_freq_shift == 1.0
    with pytest.raises(ValueError, match="`teacher` must fit .* time_freq_shift 0.0 != 1.0"):
        LiTTransformer2DModel.from_teacher(tiny_dit(), time_freq_shift=0.0)
    with pytest.raises(ValueError, match="`teacher` must fit .* time_freq_shift 1.0 != 0.0"):
        LiTTransformer2DModel.from_teacher(official, time_freq_shift=1.0)


def test_the_student_may_have_another_sample_size():
    assert LiTTransformer2DModel.from_teacher(tiny_dit(), sample_size=16).config.sample_size == 16


def test_a_softmax_student_is_a_control():
    teacher, student = tiny_dit(), randomize(tiny_dit(), seed=1)
    report = inherit_weights(student, teacher, "all")
    assert not report.initialized
    assert not report.left_out
    assert torch.equal(student(**inputs()).sample, teacher(**inputs()).sample)
    report = inherit_weights(randomize(student, seed=1), teacher)
    assert all(".attn1." in name for name in report.initialized)
    assert "transformer_blocks.0.attn1.to_q.weight" in report.initialized
    assert student.proj_out_2.weight.equal(teacher.proj_out_2.weight)


def test_a_lit_goes_on_at_another_resolution():
    """With its table resized a model of 8 x 8 latents sees 16 x 16 ones at positions it knows."""
    small = tiny_lit()
    large = LiTTransformer2DModel.from_teacher(small, "all", sample_size=16, interpolation_scale=2)
    assert large.config.interpolation_scale == 2
    assert torch.equal(large(**inputs(16, 16)).sample, small(**inputs(16, 16)).sample)
    extended = LiTTransformer2DModel.from_teacher(small, "all", sample_size=16)
    table = extended.pos_embed.pos_embed.unflatten(1, (8, 8))
    torch.testing.assert_close(table[:, :4, :4].flatten(1, 2), small.pos_embed.pos_embed)
    resized = large.pos_embed.pos_embed.unflatten(1, (8, 8))
    torch.testing.assert_close(resized[:, ::2, ::2].flatten(1, 2), small.pos_embed.pos_embed)
    with pytest.raises(ValueError, match="`interpolation_scale` must be positive, got 0"):
        tiny_lit(interpolation_scale=0)


def test_errors_leave_the_student_alone():
    lit = tiny_lit()
    before = {name: tensor.clone() for name, tensor in lit.state_dict().items()}
    with pytest.raises(ValueError, match="`policy` must be one of all_but_attention, .* got 'any'"):
        inherit_weights(lit, tiny_dit(), "any")
    with pytest.raises(ValueError, match="the teacher lacks transformer_blocks.0.attn1.dwc"):
        inherit_weights(lit, tiny_dit(), "all")
    with pytest.raises(ValueError, match="`teacher` must fit the student, .* num_linear_heads 2 "):
        inherit_weights(tiny_lit(num_linear_heads=2), lit, "all")
    with pytest.raises(ValueError, match="`teacher` must fit the student, .* num_layers 2 != 3"):
        inherit_weights(lit, tiny_dit(num_layers=3))
    with pytest.raises(ValueError, match="`student` must have transformer blocks, got a PixelAuto"):
        inherit_weights(PixelAutoencoder(), tiny_dit())
    broken = tiny_dit()
    broken.proj_out_2 = torch.nn.Linear(32, 16)
    with pytest.raises(
        ValueError, match=r"proj_out_2.weight is \(32, 32\) here, \(16, 32\) in the"
    ):
        inherit_weights(lit, broken)
    broken.proj_out_2 = torch.nn.Identity()
    with pytest.raises(ValueError, match="the teacher lacks proj_out_2.weight"):
        inherit_weights(lit, broken)
    odd = tiny_dit()
    odd.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the student has no place for extra.weight"):
        inherit_weights(lit, odd)
    for name, tensor in lit.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_from_teacher_errors():
    with pytest.raises(ValueError, match=r"`overrides` must be arguments of LiT.*\['heads'\]"):
        LiTTransformer2DModel.from_teacher(tiny_dit(), heads=3)
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16,
        caption_channels=8, sample_size=8, out_channels=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`teacher` must have a configuration that LiT.* takes"):
        LiTTransformer2DModel.from_teacher(pixart)
