"""Frechet distance, feature spaces and the comparison of generated images with real ones."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from lintra.diffusion.evaluation import (
    FeatureSpace,
    check_feature_space,
    compare_images,
    evaluate_images,
    frechet_distance,
    match_classes,
    open_feature_space,
)
from lintra.diffusion.training.images import ImageSource, open_images

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
SQUEEZENET = SHARED / "squeezenet1_0_deepcomp_fp16.pth"


def stack(source: ImageSource, number: int | None = None) -> Tensor:
    return torch.stack([source[i]["image"] for i in range(number or len(source))])


@pytest.fixture(scope="module")
def digits_space() -> FeatureSpace:
    return open_feature_space("digits")


class Brightness(FeatureSpace):
    """Two classes, dark and bright, by the mean of the image."""

    name = "brightness"
    description = "mean of the pixels"
    classes = ["dark", "bright", "never"]

    def _analyse_batch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = images.float().flatten(1).mean(1) / 255
        never = torch.full_like(mean, -1)
        return images.float().flatten(1), torch.stack([1 - mean, mean, never], 1)


class Flat(ImageSource):
    """Images of one grey each."""

    def __init__(self, greys: list[int], labels: list[int], classes: list[str]) -> None:
        self.greys, self.labels, self.classes = greys, torch.tensor(labels), classes
        self.resolution, self.channels = 2, 1

    def __getitem__(self, index: int) -> dict:
        image = torch.full((1, 2, 2), self.greys[index], dtype=torch.uint8)
        return {"image": image, "label": int(self.labels[index])}

    def _read(self, index: int) -> Tensor:
        raise NotImplementedError


def gaussian(number: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Samples whose own mean and covariance are exactly those."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def test_frechet_distance_of_commuting_gaussians() -> None:
    mean_a, mean_b = torch.tensor([1.0, 2, 3]).double(), torch.tensor([1.0, 0, 4]).double()
    var_a, var_b = torch.tensor([1.0, 4, 9]).double(), torch.tensor([4.0, 4, 1]).double()
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    a = gaussian(40, mean_a, turn @ var_a.diag() @ turn.T, 0)
    b = gaussian(50, mean_b, turn @ var_b.diag() @ turn.T, 1)
    # |mu_a - mu_b|^2 + sum (s_a - s_b)^2 along the shared axes
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=1e-10)


@pytest.mark.parametrize(("num_a", "num_b"), [(200, 150), (7, 200), (5, 6)])
def test_frechet_distance_equals_the_product_form(num_a: int, num_b: int) -> None:
    mix = torch.randn(24, 24, dtype=torch.float64)
    a, b = torch.randn(num_a, 24).double() @ mix, torch.randn(num_b, 24).double() + 0.5
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # The trace of a matrix root is the sum of the roots of its eigenvalues, symmetric or not.
    shared = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = (means + cov_a.trace() + cov_b.trace() - 2 * shared).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_equal_sets_is_zero_also_with_few_samples() -> None:
    a = torch.randn(5, 64) * 100
    scale = a.double().T.cov().trace().item()
    assert 0 <= frechet_distance(a, a) < 1e-6 * scale
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 64, rel=1e-4)
    assert frechet_distance(torch.ones(2, 1), torch.zeros(3, 1)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 2), r"`features_a` must have shape \(N, F\), got \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3, 4), "`features_b` must have 2 features.*, got 4"),
        (torch.zeros(3, 2), torch.zeros(1, 2), "`features_b` must have at least 2 samples, got 1"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2), "`features_a` must be finite, got NaN"),
    ],
)
def test_frechet_distance_errors(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


@pytest.mark.parametrize("resolution", [8, 28, 32])
def test_digits_classifier_knows_held_out_digits(
    digits_space: FeatureSpace, resolution: int
) -> None:
    source = open_images("digits", resolution=resolution, split="test")
    images = stack(source)
    accuracy = (digits_space.predict(images) == source.labels).float().mean()
    assert accuracy > 0.97
    features = digits_space.features(images)
    assert features.shape == (297, 64)
    assert features.dtype == torch.float32
    rgb = images.expand(-1, 3, -1, -1)
    torch.testing.assert_close(digits_space.features(rgb), features)


def test_digits_space_describes_itself_and_is_trained_once(digits_space: FeatureSpace) -> None:
    text = digits_space.description
    assert f"accuracy {digits_space.held_out_accuracy:.4f} on the 297 others" in text
    assert "MLPClassifier" in text
    assert "8x8" in text
    again = open_feature_space("digits", batch_size=7)
    images = stack(open_images("digits", resolution=8), 20)
    torch.testing.assert_close(again.features(images), digits_space.features(images))


def test_digits_distances_are_in_order(digits_space: FeatureSpace) -> None:
    train = open_images("digits", resolution=32, split="train")
    test = open_images("digits", resolution=32, split="test")
    images = stack(test)
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    half = torch.where(torch.rand(images.shape) < 0.8, images, noise)
    real, spoilt, nothing = (
        evaluate_images(x, test.labels, train, digits_space) for x in (images, half, noise)
    )
    assert real["class_accuracy"] > 0.97
    assert real["class_accuracy"] > spoilt["class_accuracy"] > nothing["class_accuracy"]
    assert real["frechet_distance"] < spoilt["frechet_distance"] < nothing["frechet_distance"]
    assert real["frechet_distance"] < 1.5
    assert (real["num_images"], real["num_source_images"]) == (297, 1500)
    assert real["space"] == "digits"
    assert real["description"] == digits_space.description


def test_evaluate_counts_among_the_classes_of_the_source() -> None:
    source = Flat([0, 10, 250, 255], [0, 0, 1, 1], ["Dark", "Bright"])
    images = torch.tensor([0, 255, 255, 9], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    space = Brightness(batch_size=3)
    report = evaluate_images(images, [0, 1, 0, 0], source, space)
    assert report["class_accuracy"] == 0.75
    assert report["source_accuracy"] == 1.0
    assert report["frechet_distance"] == pytest.approx(
        frechet_distance(images.flatten(1).float(), stack(source).flatten(1).float())
    )
    swapped = evaluate_images(images, [0, 1, 0, 0], source, space, class_ids=[1, 0])
    assert swapped["class_accuracy"] == 0.25
    unknown = evaluate_images(images, None, source, space)
    assert unknown["class_accuracy"] is None
    assert unknown["frechet_distance"] == report["frechet_distance"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.zeros(1, 1, 2, 2).byte()},
            r"`images` must be .* N >= 2, got \(1, 1, 2, 2",
        ),
        ({"images": torch.zeros(4, 1, 3, 2).byte()}, "must have the source's size 2x2, got 3x2"),
        ({"labels": [0, 1]}, r"`labels` must be 4 numbers, one per image, got \(2,\)"),
        ({"labels": [0, 1, 2, 0]}, "`labels` must be below 2, got 2"),
        ({"labels": [0, 1, -1, 0]}, "`labels` must be below 2, got -1"),
        ({"class_ids": [0]}, r"`class_ids` must be 2 numbers below 3, got \[0\]"),
        ({"class_ids": [0, 3]}, r"`class_ids` must be 2 numbers below 3, got \[0, 3\]"),
    ],
)
def test_evaluate_errors(changes: dict, message: str) -> None:
    arguments = {
        "images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        "labels": [0, 1, 0, 1],
        "source": Flat([0, 255], [0, 1], ["dark", "bright"]),
        "space": Brightness(),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        evaluate_images(**arguments)


def test_images_of_a_wrong_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"`images` must be uint8, got torch.float32"):
        Brightness().features(torch.zeros(2, 1, 2, 2))
    with pytest.raises(ValueError, match=r"`images` must be \(N, 1 or 3, H, W\), got \(2, 2, 2\)"):
        Brightness().predict(torch.zeros(2, 2, 2, dtype=torch.uint8))


def test_classes_are_matched_by_name_or_by_imagenets_order() -> None:
    space = Brightness()
    assert match_classes(["BRIGHT", "dark"], space) == [1, 0]
    assert match_classes(["n00000007", "n00000002", "n00000005"], space) == [2, 0, 1]
    with pytest.raises(ValueError, match=r"`class_ids` must be given, .*'brightness'.*got \['x'\]"):
        match_classes(["x", "dark"], space)


def write_model(name: str, file: Path) -> torch.nn.Module:
    model = torchvision.models.get_model(name, weights=None).eval()
    if file.suffix == ".safetensors":
        save_file(model.state_dict(), file)
    else:
        torch.save(model.state_dict(), file)
    return model


@torch.no_grad()
def test_torchvision_space(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    model = write_model("shufflenet_v2_x0_5", file)
    space = open_feature_space("shufflenet_v2_x0_5", weights=file, batch_size=2)
    images = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    body = torch.nn.Sequential(*list(model.children())[:-1])
    torch.testing.assert_close(space.features(images), body(inputs).mean((2, 3)))
    assert torch.equal(space.predict(images), model(inputs).argmax(1))
    assert space.features(images[:, :1, :50, :50]).shape == (3, 1024)
    assert space.classes[0] == "tench"
    for word in ("shufflenet_v2_x0_5", "mine.safetensors", "`fc`", "224x224", "RGB 0..1", "0.485"):
        assert word in space.description


@torch.no_grad()
def test_caffe_squeezenet_takes_bgr_bytes_without_a_mean_pixel(tmp_path: Path) -> None:
    model = write_model("squeezenet1_0", tmp_path / "w.pth")
    space = open_feature_space("squeezenet1_0_caffe", weights=tmp_path / "w.pth")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    blue_first = images[:, [2, 1, 0]].float() - torch.tensor([104.0, 117, 123]).view(3, 1, 1)
    expected = model.features(blue_first).mean((2, 3))
    torch.testing.assert_close(space.features(images), expected, rtol=1e-4, atol=1e-4)
    assert "BGR 0..255, minus (104.0, 117.0, 123.0)" in space.description


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("inception", "w.pth", "`space` must be 'digits', .* classification model .*'inception'"),
        ("resnet18", None, "`weights` must be given for the space 'resnet18', got None"),
        ("resnet18", "no.pth", "`weights` must be an existing file, got .*no.pth"),
        ("digits", "w.pth", "`weights` must be None for the space 'digits', got .*w.pth"),
    ],
)
def test_space_names_and_paths(
    tmp_path: Path, name: str, weights: str | None, message: str
) -> None:
    (tmp_path / "w.pth").touch()
    for opener in (check_feature_space, lambda n, w: open_feature_space(n, weights=w)):
        with pytest.raises(ValueError, match=message):
            opener(name, None if weights is None else tmp_path / weights)


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
def test_weights_that_do_not_fit_name_the_file(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    write_model("squeezenet1_1", path)
    with pytest.raises(ValueError, match=rf"must be a state dict of torchvision's shuffle.*{file}"):
        open_feature_space("shufflenet_v2_x0_5", weights=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"`weights` must be a readable state dict, got .*{file}"):
        open_feature_space("squeezenet1_1", weights=path)


def test_weights_must_be_tensors_only(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="`weights` must be a flat state dict of tensors"):
        open_feature_space("squeezenet1_1", weights=tmp_path / "w.pth")


@pytest.mark.skipif(not SQUEEZENET.is_file(), reason=f"needs the shared weights {SQUEEZENET}")
def test_squeezenet_knows_imagenette() -> None:
    space = open_feature_space("squeezenet1_0_caffe", weights=SQUEEZENET, batch_size=20)
    source = open_images("npz", path=SHARED / "imagenette64_val.npz", resolution=64)
    ids = torch.tensor(match_classes(source.classes, space))
    assert ids.tolist() == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    images, labels = stack(source, 60), source.labels[:60]
    features, logits = space.analyse(images)
    assert features.shape == (60, 512)
    # Chance is 0.001 among all classes and 0.1 among the ten.
    assert (logits.argmax(1) == ids[labels]).float().mean() > 0.1
    assert (logits[:, ids].argmax(1) == labels).float().mean() > 0.5


def test_pairs_of_images_are_compared() -> None:
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    images[1::2] = 100
    others = images.clone()
    others[:, :, 0, 0] += 20
    found = compare_images(images, others, Brightness())
    assert found["rms"] == pytest.approx((20**2 / 4) ** 0.5)
    same = compare_images(images, images, Brightness())
    assert (same["rms"], same["frechet"]) == (0, pytest.approx(0, abs=1e-6))
    assert found["frechet"] > 1e-6
    with pytest.raises(ValueError, match=r"`others` must have the shape of `images`, \(4, 1, 2, 2"):
        compare_images(images, others[:2], Brightness())
