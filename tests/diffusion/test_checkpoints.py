"""Official DiT weights in diffusers' classes: the authors' numbers, and files that do not fit."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from golden_cases import load_case, noise_tensor
from lintra.diffusion import LiTTransformer2DModel, OfficialDiTTransformer2DModel
from lintra.diffusion.checkpoints import (
    SIZES,
    dit_name,
    infer_dit_config,
    load_official_dit,
    read_dit_file,
)
from official_dit import CASES, arguments_of, official_file, official_state

TRAINED = "D_dit_s2like"


def load(case: str = TRAINED, **changes: object) -> torch.nn.Module:
    return load_official_dit(official_state(case), **{**arguments_of(case), **changes})


def call(model: torch.nn.Module, case: str, x: torch.Tensor) -> torch.Tensor:
    _, tensors = load_case(case)
    return model(x, timestep=tensors["t"], class_labels=tensors["y"]).sample


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_authors(case):
    description, tensors = load_case(case)
    model = load(case)
    x = noise_tensor(description["inputs"]["x"]).requires_grad_()
    out = call(model, case, x)
    atol = description["suggested_atol"]
    torch.testing.assert_close(out, tensors["output"], atol=atol, rtol=1e-5)
    (out * noise_tensor(description["inputs"]["do"])).sum().backward()
    blocks = model.transformer_blocks
    attention = blocks[0].attn1
    qkv = torch.cat(
        [layer.weight.grad for layer in (attention.to_q, attention.to_k, attention.to_v)]
    )
    # The authors' embedders are one; the copies' gradients add up to theirs.
    labels = sum(b.norm1.emb.class_embedder.embedding_table.weight.grad for b in blocks)
    time = sum(b.norm1.emb.timestep_embedder.linear_1.bias.grad for b in blocks)
    gradients = {
        "dx": x.grad,
        "grad.blocks.0.attn.qkv.weight": qkv,
        "grad.blocks.1.adaLN_modulation.1.bias": blocks[1].norm1.linear.bias.grad,
        "grad.t_embedder.mlp.0.bias": time,
        "grad.y_embedder.embedding_table.weight": labels,
    }
    for name, value in gradients.items():
        expected = tensors[name]
        bound = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(value[: len(expected)], expected, atol=bound, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_form_of_diffusers_is_another_function(case):
    description, tensors = load_case(case)
    x = noise_tensor(description["inputs"]["x"])
    with torch.no_grad():
        out = call(load(case, form="diffusers"), case, x)
    expected = tensors["output_diffusers_as_converted"]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (out - tensors["output"]).abs().max() > 1


def test_the_exact_form_survives_saving(tmp_path):
    model, x = load(), noise_tensor(load_case(TRAINED)[0]["inputs"]["x"])
    model.save_pretrained(tmp_path)
    again = OfficialDiTTransformer2DModel.from_pretrained(tmp_path)
    assert (again.config.time_freq_shift, again.config.norm_eps) == (0.0, 1e-6)
    assert torch.equal(call(again, TRAINED, x), call(model, TRAINED, x))


def test_time_features_of_the_exact_form():
    _, tensors = load_case(TRAINED)
    lit = LiTTransformer2DModel.from_teacher(load())
    for model in (load(), lit):
        for block in model.transformer_blocks:
            features = block.norm1.emb.time_proj(tensors["t"])
            torch.testing.assert_close(features, tensors["time_features"], atol=1e-4, rtol=0)


def test_guidance_of_the_authors():
    description, tensors = load_case(TRAINED)
    x = noise_tensor(description["inputs"]["x"])
    half = x[: len(x) // 2]
    with torch.no_grad():
        out = load()(
            torch.cat([half, half]), timestep=tensors["cfg_t"], class_labels=tensors["cfg_y"]
        ).sample
    conditional, unconditional = out[:, :3].chunk(2)
    guided = unconditional + description["cfg"]["scale"] * (conditional - unconditional)
    out = torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)
    torch.testing.assert_close(out, tensors["output_cfg"], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_label_rules():
    embedder = load().transformer_blocks[0].norm1.emb.class_embedder
    assert embedder.embedding_table.num_embeddings == 11
    dropped = embedder.token_drop(torch.arange(4), torch.tensor([1, 0, 0, 1]))
    assert torch.equal(dropped, load_case(TRAINED)[1]["label_drop.forced"])
    table = load("D_dit_p4_nosigma_nodrop").transformer_blocks[0].norm1.emb.class_embedder
    assert table.embedding_table.num_embeddings == 8
    assert not table.embedding_table.weight[7].any()


def test_classes_are_read_off_the_table():
    state = official_state(TRAINED)
    rows = {11: 10, 1000: 1000, 1001: 1000}
    for number, classes in rows.items():
        state["y_embedder.embedding_table.weight"] = torch.zeros(number, 48)
        assert infer_dit_config(state, num_heads=3)["num_embeds_ada_norm"] == classes


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_inferred(size, patch):
    depth, width, heads = SIZES[size]
    with torch.device("meta"):
        shapes = {
            "pos_embed": (1, (32 // patch) ** 2, width),
            "x_embedder.proj": (width, 4, patch, patch),
            "t_embedder.mlp.0": (width, 256),
            "t_embedder.mlp.2": (width, width),
            "y_embedder.embedding_table": (1001, width),
            "final_layer.adaLN_modulation.1": (2 * width, width),
            "final_layer.linear": (8 * patch**2, width),
        }
        for i in range(depth):
            shapes |= {
                f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
                f"blocks.{i}.attn.qkv": (3 * width, width),
                f"blocks.{i}.attn.proj": (width, width),
                f"blocks.{i}.mlp.fc1": (4 * width, width),
                f"blocks.{i}.mlp.fc2": (width, 4 * width),
            }
        state = {"pos_embed": torch.empty(shapes.pop("pos_embed"))}
        for name, shape in shapes.items():
            state[f"{name}.weight"] = torch.empty(shape)
            if "table" not in name:
                state[f"{name}.bias"] = torch.empty(shape[0])
        config = infer_dit_config(state)
        model = OfficialDiTTransformer2DModel(**config)
    assert dit_name(model) == f"DiT-{size}/{patch}"
    assert config["num_attention_heads"] == heads
    assert (config["sample_size"], config["out_channels"]) == (32, 8)
    assert config["num_embeds_ada_norm"] == 1000


def test_containers(tmp_path):
    state = official_state(TRAINED)
    raw = {f"module.{name}": tensor + 1 for name, tensor in state.items()}
    path = official_file(
        tmp_path, model=raw, opt={"state": {}}, args=argparse.Namespace(model="DiT-S/2")
    )
    source, ema = read_dit_file(path)
    assert source == "ema"
    assert all(torch.equal(ema[name], state[name]) for name in state)
    source, model = read_dit_file(path, prefer_ema=False)
    assert source == "model"
    assert all(torch.equal(model[name], state[name] + 1) for name in state)
    assert read_dit_file(official_file(tmp_path))[0] == ""
    save_file(state, tmp_path / "a.safetensors")
    assert read_dit_file(tmp_path / "a.safetensors")[1].keys() == state.keys()


def test_half_precision_files():
    state = {name: tensor.bfloat16() for name, tensor in official_state(TRAINED).items()}
    assert load_official_dit(state, num_heads=3).dtype == torch.float32


class _Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`checkpoint` must be an existing file, got 'none.pt'"):
        read_dit_file("none.pt")
    path = official_file(tmp_path)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="`checkpoint` must be a whole file of tensors .*off"):
            read_dit_file(path)
    path.write_bytes(pickle.dumps({"model": _Code()}))
    with pytest.raises(ValueError, match="`checkpoint` must be a whole file of tensors"):
        read_dit_file(path)
    torch.save({"model": _Code()}, path)
    message = "`checkpoint` must be a whole file .*: cut off, or with other objects than tensors"
    with pytest.raises(ValueError, match=message):
        read_dit_file(path)
    assert not (tmp_path / "ran").exists()
    for contents, found in (({"opt": {}, "step": 3}, "opt, step"), ([1], "list")):
        torch.save(contents, path)
        with pytest.raises(ValueError, match=f"`checkpoint` must be a state dict .*, got {found}"):
            read_dit_file(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed": None}, "must hold every tensor of a DiT, lacks pos_embed$"),
        ({"blocks.0.mlp.fc1.bias": None}, r"tensor of a DiT, lacks blocks\.0\.mlp\.fc1\.bias"),
        (
            dict.fromkeys(official_state(TRAINED)),
            "every tensor of a DiT, lacks pos_embed, .* and 18 more",
        ),
        ({"lora.weight": torch.zeros(2, 2)}, "must hold only a DiT, got also lora.weight"),
        ({"pos_embed": torch.zeros(16, 48)}, r"hold pos_embed of 3 dimensions, got \(16, 48\)"),
        ({"pos_embed": torch.zeros(1, 15, 48)}, r"pos_embed of a square grid .* \(1, 15, 48\)"),
        ({"pos_embed": torch.zeros(1, 16, 48)}, "the fixed sin-cos pos_embed, got one .* 1 off"),
        ({"final_layer.linear.weight": torch.zeros(48, 48)}, "predict 4 channels, or 8 .* got 48"),
        (
            {"blocks.1.mlp.fc1.weight": torch.zeros(96, 48)},
            r"shapes of one DiT, got transformer_blocks.1.ff.net.0.proj.weight \(96, 48\) for \(",
        ),
    ],
)
def test_weights_that_do_not_fit(changes, message):
    state = {**official_state(TRAINED), **changes}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        load_official_dit(state, num_heads=3)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="`form` must be one of official, diffusers, got 'old'"):
        load(form="old")
    with pytest.raises(ValueError, match="`num_heads` must be given for a width of 48 .* None"):
        load(num_heads=None)
    with pytest.raises(ValueError, match="`num_heads` must divide the 48 channels, got 5"):
        load(num_heads=5)
    with pytest.raises(ValueError, match="`num_classes` must be 10 or 11 .* 11 rows, got 1000"):
        load(num_classes=1000)
