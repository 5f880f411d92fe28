"""From official CLEAR weights and a stock FLUX folder to a pipeline folder that opens."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lintra.diffusion import ClearFluxTransformer2DModel, assert_linear, load_pipeline
from lintra.diffusion.clear_conversion import LICENCE_NOTE, convert_clear
from lintra.diffusion.clear_weights import clear_parameter_names
from lintra.tools import convert
from tiny_clear import sample, tiny_clear, tiny_clear_pipeline, tiny_stock


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "FLUX"
    tiny_clear_pipeline("flux", tiny_stock("flux")).save_pretrained(folder)
    (folder / "LICENSE.md").write_text("terms")
    (folder / "flux1-dev.safetensors").write_text("the same weights once more")
    return folder


def official(folder, name, down_factor=None, **changes):
    """A file with the layout of the authors, and the model that it belongs to."""
    model = tiny_clear("flux", 8, down_factor=down_factor, **changes)
    weights = {}
    for parameter in clear_parameter_names(model):
        torch.nn.init.normal_(model.get_parameter(parameter), std=0.2)
        weights[parameter] = model.get_parameter(parameter).detach().clone()
    save_file(weights, folder / name)
    return folder / name, model


@pytest.mark.parametrize("down_factor", [None, 2])
def test_converting(down_factor, base, tmp_path, capsys):
    name = "clear_local_8" + (f"_down_{down_factor}" if down_factor else "") + ".safetensors"
    file, trained = official(tmp_path, name, down_factor)
    folder = tmp_path / "new" / "out"
    words = [str(file), str(folder), "--from", "clear", "--base", str(base)]
    assert convert.main(words) == 0
    out = capsys.readouterr().out
    assert "CLEAR attention, radius 8" in out
    assert ("keys pooled 2 x" in out) == (down_factor is not None)
    assert LICENCE_NOTE in out
    assert LICENCE_NOTE in (folder / "README.md").read_text()
    assert f"load_pipeline('{folder}')" in out

    pipeline = load_pipeline(folder)
    model = pipeline.transformer
    assert type(model) is ClearFluxTransformer2DModel
    assert (model.config.radius, model.config.down_factor) == (8, down_factor)
    assert_linear(model)
    assert (
        load_file(next((folder / "transformer").glob("*.safetensors")))["x_embedder.weight"].dtype
        == torch.bfloat16
    )
    expected = tiny_clear_pipeline("flux", trained.to(torch.bfloat16).float())
    torch.testing.assert_close(sample("flux", pipeline), sample("flux", expected))
    copied = {path.name for path in folder.iterdir()}
    assert copied == {
        *("README.md", "LICENSE.md", "model_index.json", "scheduler", "transformer", "vae")
    }


def test_another_name_needs_the_radius(base, tmp_path):
    file, _ = official(tmp_path, "mine.safetensors", 2)
    with pytest.raises(ValueError, match="`radius` must be given .* got mine.safetensors"):
        convert_clear(file, tmp_path / "out", base=base)
    report = convert_clear(file, tmp_path / "out", base=base, radius=5.5, dtype=None)
    assert (report.radius, report.down_factor, report.dtype) == (5.5, 2, torch.float32)
    assert report.replaced[0] == 2 * (8 + 6) + 4
    assert report.base == "FLUX"


@pytest.mark.parametrize(
    ("name", "down_factor", "arguments", "message"),
    [
        ("clear_local_8_down_4", 2, {}, "hold what its name says, down factor 4, got 2 in clear"),
        ("clear_local_8_down_2", None, {}, "its name says, down factor 2, got None in clear_local"),
        ("clear_local_8", 2, {}, "what its name says, down factor None, got 2"),
        ("clear_local_8", None, {"radius": 16}, "`radius` must be that .*, 8, got 16 for clear"),
        ("clear_local_8", None, {"down_factor": 4}, "`down_factor` must be .* None, got 4"),
    ],
)
def test_another_variant(name, down_factor, arguments, message, base, tmp_path):
    file, _ = official(tmp_path, f"{name}.safetensors", down_factor)
    with pytest.raises(ValueError, match=message):
        convert_clear(file, tmp_path / "out", base=base, **arguments)
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_fit(base, tmp_path, capsys):
    def refused(checkpoint, folder, message):
        words = [str(checkpoint), str(tmp_path / "out"), "--from", "clear"]
        words += [] if folder is None else ["--base", str(folder)]
        assert convert.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / "out").exists()

    file, _ = official(tmp_path, "clear_local_8.safetensors")
    refused(file, None, "error: `--base` must be given for --from clear, got none")
    refused(tmp_path / "absent.safetensors", base, "but there is no")
    cut = tmp_path / "cut" / file.name
    cut.parent.mkdir()
    cut.write_bytes(file.read_bytes()[:-100])
    refused(cut, base, "`weights` must be a safetensors file, got")
    more, _ = official(cut.parent, file.name, num_layers=3)
    refused(more, base, "must hold the 28 tensors that CLEAR trains, got 8 problems")
    wide, _ = official(cut.parent, file.name, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
    refused(wide, base, "weight is (64, 64), not (32, 32)")

    sd3 = tmp_path / "sd3"
    tiny_clear_pipeline("sd3", tiny_stock("sd3")).save_pretrained(sd3)
    refused(file, sd3, "with a FluxTransformer2DModel, got SD3Transformer2DModel")
    refused(file, tmp_path, "must be a pipeline folder, but there is no file")
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (weights,) = (broken / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(file, broken, "`base` must hold a whole transformer, got")
    shutil.rmtree(broken / "transformer")
    refused(file, broken, "`base` must hold its transformer, but there is no")
    with pytest.raises(ValueError, match="`folder` must not be the base"):
        convert_clear(file, base, base=base)
    (broken / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    refused(file, broken, "got no transformer")


def test_pooling_kernels_of_two_sizes(base, tmp_path):
    file, _ = official(tmp_path, "mine.safetensors", 2)
    weights = load_file(file)
    weights[next(name for name in weights if "spatial" in name)] = torch.ones(1, 1, 1, 3, 1, 3, 1)
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"pooling kernels of one size, got \[2, 3\]"):
        convert_clear(file, tmp_path / "out", base=base, radius=8)
