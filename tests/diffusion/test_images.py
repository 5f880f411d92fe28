"""The image sources of a recipe: what they give, what they refuse, what they skip."""

import io
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lintra.diffusion.training.images import DigitsImages, ImageFormat, open_images

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def photo(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size[0] * 2, size[1] * 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name).mkdir()
        for index, suffix in enumerate(("png", "jpg", "webp", "bmp", "JPEG")):
            photo(10 * label + index).save(tmp_path / name / f"{index}.{suffix}")
    return tmp_path


def write_npz(path: Path, **changes: np.ndarray | None) -> Path:
    arrays = {
        "images": np.arange(5 * 6 * 4 * 3, dtype=np.uint8).reshape(5, 6, 4, 3),
        "labels": np.array([0, 1, 2, 1, 0]),
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_packed(path: Path, **changes: np.ndarray | None) -> Path:
    bodies = []
    for seed in range(4):
        file = io.BytesIO()
        photo(seed, (8, 8)).save(file, "WEBP", lossless=True)
        bodies.append(file.getvalue())
    # The first byte of every file is stored once, as a shared header is.
    arrays = {
        "data": np.frombuffer(b"".join(body[1:] for body in bodies), np.uint8),
        "lengths": np.array([len(body) - 1 for body in bodies], np.uint32),
        "header_id": np.zeros(4, np.uint8),
        "headers": np.frombuffer(bodies[0][:1], np.uint8),
        "header_lengths": np.array([1], np.uint32),
        "labels": np.array([0, 1, 0, 1], np.uint16),
        "classes": np.array(["n01", "n02"]),
        "names": np.array(["tench", "church"]),
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_digits_at_their_own_size_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    source = open_images("digits", resolution=8)
    digits = load_digits()
    item = source[17]
    assert len(source) == 1797
    assert source.classes == [str(digit) for digit in range(10)]
    assert item["image"].shape == (1, 8, 8)
    assert item["image"].dtype == torch.uint8
    np.testing.assert_array_equal(item["image"][0], np.rint(digits.images[17] * 255 / 16))
    assert item["label"] == digits.target[17]
    assert isinstance(item["label"], int)
    np.testing.assert_array_equal(source.labels, digits.target)
    assert source.labels.dtype == torch.int64


def test_digits_splits_are_stratified_and_apart() -> None:
    train, test = (open_images("digits", resolution=8, split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (1500, 297)
    assert test.labels.bincount().min() >= 28
    whole = open_images("digits", resolution=8)
    images = {bytes(whole[i]["image"].numpy()) for i in range(len(whole))}
    parts = [{bytes(s[i]["image"].numpy()) for i in range(len(s))} for s in (train, test)]
    assert parts[0] | parts[1] == images
    again = open_images("digits", resolution=8, split="test")
    assert torch.equal(again.labels, test.labels)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_digits_are_resized_and_get_channels(interpolation: str) -> None:
    source = open_images("digits", resolution=20, channels=3, interpolation=interpolation)
    image = source[0]["image"]
    assert image.shape == (3, 20, 20)
    assert source.channels == 3
    assert torch.equal(image[0], image[2])
    small = open_images("digits", resolution=8)[0]["image"]
    assert abs(image.float().mean() - small.float().mean()) < 6


def test_folder_gives_rgb_squares_in_a_fixed_order(folder: Path) -> None:
    source = open_images("imagefolder", path=folder, resolution=16)
    assert source.classes == ["ant", "bee", "cat"]
    assert source.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert source.broken == []
    assert all(source[i]["image"].shape == (3, 16, 16) for i in range(len(source)))
    assert source[5]["label"] == 1
    with pytest.raises(IndexError):
        source[15]


def test_crop_keeps_the_middle_and_squash_keeps_the_borders(tmp_path: Path) -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 200
    (tmp_path / "stripe").mkdir()
    Image.fromarray(pixels).save(tmp_path / "stripe" / "a.png")
    crop = open_images("imagefolder", path=tmp_path, resolution=16)[0]["image"]
    squash = open_images("imagefolder", path=tmp_path, resolution=16, center_crop=False)[0]["image"]
    assert (crop == 200).all()
    assert (squash[..., 0] < 20).all()
    assert (squash[..., 8] > 180).all()
    grey = open_images("imagefolder", path=tmp_path, resolution=16, channels=1)[0]["image"]
    assert grey.shape == (1, 16, 16)


def test_grey_survives_rgb() -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(ImageFormat(resolution=16, channels=1).fit(grey.expand(3, -1, -1)), grey)


def test_odd_image_modes_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    grey16 = np.full((8, 8), 0x8000, np.uint16)
    Image.fromarray(grey16).save(tmp_path / "a" / "0_grey16.png")
    Image.new("P", (8, 8), 0).save(tmp_path / "a" / "1_palette.png")
    Image.new("RGBA", (8, 8), (9, 8, 7, 6)).save(tmp_path / "a" / "2_alpha.png")
    turned = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 0).repeat(4, 1))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(tmp_path / "a" / "3_turned.jpg", exif=exif, quality=95)
    source = open_images("imagefolder", path=tmp_path, resolution=8)
    assert (source[0]["image"] == 0x80).all()
    assert source[2]["image"][:, 0, 0].tolist() == [9, 8, 7]
    # Orientation 3 is half a turn: the white half comes to the left.
    assert source[3]["image"][0, 0, 0] > 200 > 50 > source[3]["image"][0, 0, 7]


def test_broken_images_are_counted_named_and_skipped(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (folder / "bee" / "1.jpg").read_bytes()
    (folder / "bee" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "0.png").write_bytes(b"")
    (folder / "cat" / "9.png").write_text("no image")
    (folder / "cat" / "notes.txt").write_text("not looked at")
    with caplog.at_level(logging.WARNING):
        source = open_images("imagefolder", path=folder, resolution=16)
    assert {file.relative_to(folder).as_posix() for file in source.broken} == {
        "bee/1.jpg",
        "cat/0.png",
        "cat/9.png",
    }
    (record,) = caplog.records
    assert "skipped 3 broken images" in record.getMessage()
    assert str(folder / "bee" / "1.jpg") in record.getMessage()
    assert source.labels.bincount().tolist() == [5, 4, 4]
    batches = list(DataLoader(source, batch_size=4))
    assert sum(len(batch["label"]) for batch in batches) == 13


def test_at_most_ten_broken_images_are_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(12):
        (folder / "ant" / f"broken{index:02d}.png").write_text("no image")
    open_images("imagefolder", path=folder, resolution=16)
    message = caplog.records[-1].getMessage()
    assert message.count("broken1") + message.count("broken0") == 10
    assert message.endswith(", ...")


def test_a_class_without_images_keeps_its_label(folder: Path) -> None:
    (folder / "bat").mkdir()
    (folder / ".thumbnails").mkdir()
    source = open_images("imagefolder", path=folder, resolution=16)
    assert source.classes == ["ant", "bat", "bee", "cat"]
    assert source.labels.unique().tolist() == [0, 2, 3]


def test_folder_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`path` must be an existing folder of images, got .*no"):
        open_images("imagefolder", path=tmp_path / "no", resolution=16)
    with pytest.raises(ValueError, match=f"must hold one sub-folder per class, got {tmp_path}"):
        open_images("imagefolder", path=tmp_path, resolution=16)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=f"at least one readable .*, got {tmp_path} with 0 broken"):
        open_images("imagefolder", path=tmp_path, resolution=16)
    (tmp_path / "a" / "x.png").write_text("no image")
    with pytest.raises(ValueError, match="with 1 broken and none readable"):
        open_images("imagefolder", path=tmp_path, resolution=16)


def test_npz_arrays(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz")
    source = open_images("npz", path=path, resolution=4)
    stored = np.load(path)["images"]
    assert (len(source), source.channels, source.classes) == (5, 3, ["0", "1", "2"])
    np.testing.assert_array_equal(source[3]["image"], stored[3, 1:5].transpose(2, 0, 1))
    grey = write_npz(tmp_path / "b.npz", images=stored[..., 0], classes=np.array(["x", "y", "z"]))
    source = open_images("npz", path=grey, resolution=4)
    assert (source.channels, source.classes) == (1, ["x", "y", "z"])
    np.testing.assert_array_equal(source[2]["image"], stored[None, 2, 1:5, :, 0])


def test_npz_packed(tmp_path: Path) -> None:
    source = open_images("npz", path=write_packed(tmp_path / "a.npz"), resolution=16)
    assert source.classes == ["tench", "church"]
    assert source.labels.tolist() == [0, 1, 0, 1]
    for seed in range(4):
        expected = np.asarray(photo(seed, (8, 8))).transpose(2, 0, 1)
        np.testing.assert_array_equal(source[seed]["image"], expected)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy[1]["image"], source[1]["image"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, r"a.npz must hold the arrays `images` and `labels`, got \['labels'\]"),
        ({"labels": None}, r"must hold the arrays `images` and `labels`, got \['images'\]"),
        ({"images": np.zeros((5, 4, 4), np.float32)}, "a.npz must be uint8, got float32"),
        ({"images": np.zeros((5, 4, 4, 2), np.uint8)}, r"must have shape .*got \(5, 4, 4, 2\)"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, r"must have shape .*got \(0, 4, 4, 3\)"),
        ({"labels": np.arange(4)}, r"`labels` of .*a.npz must be 5 integers.*got shape \(4,\)"),
        ({"labels": np.zeros(5)}, "must be 5 integers, one per image, got .* dtype float64"),
        (
            {"labels": np.array([0, 1, -3, 0, 0])},
            "`labels` of .*a.npz must not be negative, got -3",
        ),
        (
            {"classes": np.array(["x", "y"])},
            "`labels` of .*a.npz must be below its 2 classes, got 2",
        ),
        ({"labels": np.array([None] * 5)}, "`path` must be a readable .npz file, got .*a.npz"),
    ],
)
def test_npz_errors_name_the_file(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images("npz", path=write_npz(tmp_path / "a.npz", **changes), resolution=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": None}, r"a.npz must hold data, .*, missing \['lengths'\]"),
        ({"data": np.zeros(7, np.uint8)}, "a.npz must hold as many bytes and headers .* 7 bytes"),
        ({"header_id": np.ones(4, np.uint8)}, "must hold as many bytes and headers"),
        ({"labels": np.zeros(3, np.uint16)}, "`labels` of .*a.npz must be 4 integers"),
    ],
)
def test_packed_errors_name_the_file(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images("npz", path=write_packed(tmp_path / "a.npz", **changes), resolution=4)


def test_a_damaged_packed_image_is_named(tmp_path: Path) -> None:
    path = write_packed(tmp_path / "a.npz", headers=np.zeros(1, np.uint8))
    source = open_images("npz", path=path, resolution=4)
    with pytest.raises(ValueError, match=r"image 2 of .*a\.npz must be readable, got"):
        source[2]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_npz_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` must be a readable .npz file, got .*a\.npz"):
        open_images("npz", path=tmp_path / "a.npz", resolution=4)


def test_a_single_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"got .*a\.npy: a single array"):
        open_images("npz", path=tmp_path / "a.npy", resolution=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "cifar"}, "`source` must be one of digits, imagefolder, npz, got 'cifar'"),
        ({"source": "npz"}, "`path` must be given for source 'npz', got None"),
        ({"source": "imagefolder"}, "`path` must be given for source 'imagefolder', got None"),
        ({"source": "npz", "path": "no.npz"}, "`path` must be an existing .npz file, got no.npz"),
        ({"path": "x"}, "`path` must be None for source 'digits', got x"),
        ({"split": "val"}, "`split` must be one of all, train, test, got 'val'"),
        (
            {"source": "npz", "path": "x", "split": "test"},
            "`split` must be 'all' for source 'npz', got 'test'",
        ),
        ({"resolution": 0}, "`resolution` must be at least 1 pixel, got 0"),
        ({"channels": 4}, "`channels` must be 1, 3 or None, got 4"),
        ({"interpolation": "area"}, "`interpolation` must be one of nearest.*, got 'area'"),
    ],
)
def test_argument_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(**{"source": "digits", "resolution": 16, **arguments})


def test_sources_work_in_worker_processes() -> None:
    source = DigitsImages(ImageFormat(resolution=8))
    loader = DataLoader(source, batch_size=1000, num_workers=1, multiprocessing_context="fork")
    assert torch.cat([batch["label"] for batch in loader]).equal(source.labels)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the shared photographs in {SHARED}")
def test_imagenette_pack() -> None:
    source = open_images("npz", path=SHARED / "imagenette64_val.npz", resolution=64)
    assert len(source) == 3925
    assert source.classes[:2] == ["tench", "English springer"]
    assert source[100]["image"].shape == (3, 64, 64)
    assert source.labels[:10].tolist() == list(range(10))
    half = open_images("npz", path=SHARED / "imagenette64_val.npz", resolution=32, channels=1)
    assert half[100]["image"].shape == (1, 32, 32)
