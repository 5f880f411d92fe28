"""`lintra evaluate` on folders, files and a pipeline, and each of its mistakes as one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from lintra.diffusion.evaluation.generated import sample_generated
from lintra.diffusion.models.autoencoder_pixel import PixelAutoencoder
from lintra.diffusion.training.images import open_images
from lintra.tools import evaluate


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held-out digits as PNG in folders by class, and as one .npz."""
    root = tmp_path_factory.mktemp("generated")
    source = open_images("digits", resolution=16, split="test")
    images = [source[index]["image"][0].numpy() for index in range(len(source))]
    for index, (image, label) in enumerate(zip(images, source.labels.tolist(), strict=True)):
        (root / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "folder" / str(label) / f"{index}.png")
    np.savez(root / "file.npz", images=np.stack(images), labels=source.labels.numpy())
    return root


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=10,
    )
    names = {index: str(index) for index in range(10)}
    pipeline = DiTPipeline(
        transformer, PixelAutoencoder(in_channels=1), DDIMScheduler(), id2label=names
    )
    pipeline.register_to_config(id2label=names)
    pipeline.save_pretrained(folder)
    return folder


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert evaluate.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert evaluate.main([*map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return line


def test_folder_and_file_of_the_same_images_agree(
    held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data.resolution", 16, "--data.split", "train")
    folder = run_json(capsys, held_out / "folder", *options)
    file = run_json(capsys, held_out / "file.npz", *options)
    assert folder["class_accuracy"] > 0.97
    assert folder["source_accuracy"] > 0.97
    assert (folder["num_images"], folder["num_source_images"]) == (297, 1500)
    assert folder["class_accuracy"] == file["class_accuracy"]
    assert folder["frechet_distance"] == pytest.approx(file["frechet_distance"])
    assert (folder["space"], folder["data"]) == ("digits", "digits")


def test_the_table_names_both_sides_and_the_features(
    held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(held_out / "file.npz"), "--data.resolution", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["images", "class", "accuracy", "Frechet", "distance"]
    assert lines[1].split()[:2] == [str(held_out / "file.npz"), "297"]
    assert lines[2].split()[:3] == ["digits", "(real)", "1797"]
    assert lines[-1].startswith("features: scikit-learn MLPClassifier")


def test_a_pipeline_is_sampled_over_all_classes(
    pipeline_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (pipeline_folder, "--data.resolution", 8, "--num_images", 23)
    result = run_json(capsys, *words, "--num_inference_steps", 2, "--scheduler", "ddim")
    assert result["num_images"] == 23
    assert 0 <= result["class_accuracy"] < 0.6
    assert result["frechet_distance"] > 1


def test_folders_named_by_wordnet_ids_are_the_classes_of_imagenet(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the ids, whatever the pipeline calls its classes."""
    asked = []

    def sample(pipeline: object, labels: list[int], **options: object) -> torch.Tensor:
        asked.append(labels)
        return torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr("lintra.diffusion.sampling.sample_images", sample)
    names = [f"n{number:08d}" for number in (7, 3, 5, 1, 9, 2, 8, 4, 6, 0)]
    images, labels = np.zeros((10, 8, 8), np.uint8), np.arange(10)
    np.savez(tmp_path / "d.npz", images=images, labels=labels, classes=np.array(names))
    source = open_images("npz", path=tmp_path / "d.npz", resolution=8)
    sample_generated(pipeline_folder, source, num_images=10, num_inference_steps=1)
    assert asked[1] == [7, 3, 5, 1, 9, 2, 8, 4, 6, 0]


def test_a_pipeline_that_does_not_fit_is_one_line(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--num_inference_steps", 2, "--num_images", 4)
    assert "`resolution` must be the size of the pipeline's images, 8x8, got 16" in error_of(
        capsys, pipeline_folder, "--data.resolution", 16, *few
    )
    assert "`scheduler` must be one of ddim" in error_of(
        capsys, pipeline_folder, "--data.resolution", 8, "--scheduler", "heun", *few
    )
    images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    np.savez(
        tmp_path / "d.npz", images=images, labels=labels, classes=np.array(["a", "b", "c", "d"])
    )
    data = ("--data.source", "npz", "--data.path", tmp_path / "d.npz", "--data.resolution", 8)
    message = error_of(capsys, pipeline_folder, *data, "--class_ids", "[0,1,2,3]", *few)
    assert "knows the classes of the data" in message
    assert "without ['a', 'b', 'c', 'd']" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "`generated` must be an existing folder or .npz file, got nowhere"),
        ([".", "--space", "inception"], "`space` must be 'digits', 'squeezenet1_0_caffe' or"),
        ([".", "--space", "resnet18"], "`weights` must be given for the space 'resnet18'"),
        ([".", "--space", "resnet18", "--weights", "w.pth"], "must be an existing file, got w.pth"),
        ([".", "--data.source", "cifar"], "`source` must be one of digits, imagefolder, npz"),
        ([".", "--data.source", "npz"], "`path` must be given for source 'npz', got None"),
        ([".", "--data.split", "val"], "`split` must be one of all, train, test, got 'val'"),
        ([".", "--data.image_interpolation_mode", "x"], "`interpolation` must be one of nearest"),
        ([".", "--num_images", "1"], "`num_images` must be at least 2, got 1"),
        ([".", "--num_inference_steps", "0"], "`num_inference_steps` must be at least 1, got 0"),
        ([".", "--batch_size", "0"], "`batch_size` must be at least 1, got 0"),
        ([".", "--device", "abacus"], "`device` must be one of this machine, got 'abacus'"),
        (["."], "`path` must hold one sub-folder per class, got ."),
        ([".", "--class_ids", "[0]"], "`path` must hold one sub-folder per class, got ."),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_before_anything_is_loaded(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lintra.diffusion.evaluation.open_feature_space", None)
    assert message in error_of(capsys, *words)


def test_classes_that_the_data_does_not_have_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("3", "12", "seven"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "a.png")
    message = error_of(capsys, tmp_path, "--data.resolution", 8)
    assert "`generated` must have the classes of the data by name or number" in message
    assert "got ['12', 'seven']" in message


def test_class_ids_are_checked(held_out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (held_out / "file.npz", "--data.resolution", 16, "--class_ids", "[1,2]")
    assert "`class_ids` must be 10 numbers below 10, got [1, 2]" in error_of(capsys, *words)


@pytest.mark.parametrize("words", [["x", "--resolutoin", "3"], ["x", "--num_images", "many"], []])
def test_mistyped_options_end_with_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(words)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
