"""Official CLEAR weights: the layout, and what does not fit."""

import pytest
import torch
from safetensors.torch import save_file

from lintra.diffusion import load_clear_weights
from lintra.diffusion.clear_weights import clear_parameter_names
from tiny_clear import CLEAR, NUM_LAYERS, clear_inputs, tiny_clear, tiny_stock

both = pytest.mark.parametrize("family", ["flux", "sd3"])


def weights_of(model):
    """What an official file would hold for this model."""
    state = model.state_dict()
    return {name: state[name].clone() for name in clear_parameter_names(model)}


def official_layout(num_double, num_single, pooled):
    names = set()
    for blocks, count in (
        ("transformer_blocks", num_double),
        ("single_transformer_blocks", num_single),
    ):
        parts = ["to_q", "to_k", "to_v"] + ["to_out.0"] * (blocks == "transformer_blocks")
        for number in range(count):
            attention = f"{blocks}.{number}.attn"
            names |= {f"{attention}.{part}.{t}" for part in parts for t in ("weight", "bias")}
            names |= {f"{attention}.processor.spatial_weight"} if pooled else set()
    return names


@pytest.mark.parametrize("down_factor", [None, 4])
def test_layout_is_the_official_one(down_factor):
    with torch.device("meta"):
        model = CLEAR["flux"](guidance_embeds=True, down_factor=down_factor)
    names = clear_parameter_names(model)
    assert set(names) == official_layout(19, 38, down_factor)
    assert len(names) == (380 if down_factor is None else 437)
    numbers = sum(model.get_parameter(name).numel() for name in names)
    assert round(numbers / 1e6) == 1794


@both
@pytest.mark.parametrize("down_factor", [None, 3])
@pytest.mark.parametrize("as_file", [False, True], ids=["mapping", "file"])
def test_loading(family, down_factor, as_file, tmp_path):
    trained = tiny_clear(family, 8, down_factor=down_factor)
    for name, parameter in trained.named_parameters():
        if name in clear_parameter_names(trained):
            torch.nn.init.normal_(parameter, std=0.2)
    weights = weights_of(trained)
    model = tiny_clear(family, 8, down_factor=down_factor)
    if as_file:
        file = tmp_path / ("clear_local_8" + (f"_down_{down_factor}" if down_factor else ""))
        file = file.with_suffix(".safetensors")
        save_file(weights, file)
        load_clear_weights(model, file)
    else:
        load_clear_weights(model, weights)
        for name in weights:  # a copy
            assert model.get_parameter(name).data_ptr() != weights[name].data_ptr()
    with torch.no_grad():
        out, expected = (m(**clear_inputs(family)).sample for m in (model, trained))
    torch.testing.assert_close(out, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_that_shares_its_weights_keeps_them():
    teacher = tiny_stock("flux").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = CLEAR["flux"].from_teacher(teacher, radius=4)
    weights = {name: t.float() + 1 for name, t in weights_of(student).items()}
    load_clear_weights(student, weights)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
        mine = student.get_parameter(name)
        assert mine.dtype == torch.bfloat16
        assert (mine.data_ptr() == tensor.data_ptr()) == (name not in weights)


@both
def test_errors_leave_the_model_alone(family, tmp_path):
    model = tiny_clear(family, 8, down_factor=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = weights_of(model)
    query, kernel = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.processor"

    def refuse(weights, message):
        with pytest.raises(ValueError, match=message):
            load_clear_weights(model, weights)

    refuse({k: v for k, v in good.items() if k != query}, f"1 problems: {query} is missing")
    refuse({**good, "proj_out.weight": good[query]}, "1 problems: proj_out.weight is left over")
    refuse({**good, query: good[query][1:]}, rf"{query} is \(.*\), not \(")
    refuse(
        {k: v for k, v in good.items() if k != f"{kernel}.spatial_weight"},
        f"{kernel}.spatial_weight is missing",
    )
    refuse(weights_of(tiny_clear(family, 8)), "must be those of down_factor 3, got .* of None")
    refuse(weights_of(tiny_clear(family, 8, down_factor=2)), r"down_factor 3, got .* of \[2\]")
    plain = tiny_clear(family, 8)
    with pytest.raises(ValueError, match=r"down_factor None, got pooling kernels of \[3\]"):
        load_clear_weights(plain, good)
    for name, message in (
        ("clear_local_16_down_3", "of radius 8, .* got clear_local_16_down_3.*, of radius 16"),
        ("clear_local_8", "of radius 8, down_factor 3, got .* of radius 8, down_factor None"),
    ):
        save_file(good, tmp_path / f"{name}.safetensors")
        refuse(tmp_path / f"{name}.safetensors", message)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    refuse(tmp_path / "broken.safetensors", "`weights` must be a safetensors file, got .*broken")
    with pytest.raises(FileNotFoundError, match="`weights` must be a safetensors file, but .* no"):
        load_clear_weights(model, tmp_path / "absent.safetensors")
    model.fuse_qkv_projections()
    refuse(good, "`model` must not have fused projections")
    model.unfuse_qkv_projections()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(ValueError, match="`model` must be a CLEAR model, got a .*Transformer2DM"):
        load_clear_weights(tiny_stock(family), good)


@both
def test_layers_with_full_attention_have_no_kernel(family):
    model = tiny_clear(family, down_factor=3, full_attention_layers=[0])
    kernels = [name for name in clear_parameter_names(model) if name.endswith("spatial_weight")]
    assert len(kernels) == NUM_LAYERS[family] - 1
