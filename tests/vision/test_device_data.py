"""Training images on the device: what a crop shows, and what a batch depends on."""

import numpy as np
import pytest
import timm
import torch

import lintra.vision  # noqa: F401 - registers the models
from lintra.vision.training.config import DataConfig
from lintra.vision.training.data import NpzImages
from lintra.vision.training.device_data import DeviceBatches, random_crops


def test_the_whole_image_is_its_own_crop_and_a_flip_turns_it() -> None:
    torch.manual_seed(0)
    images = torch.rand(64, 3, 12, 16)
    crops = random_crops(images, (16.0, 16.0), 0.0, "bilinear")  # cut to the whole image
    torch.testing.assert_close(crops, images)
    flipped = random_crops(images, (16.0, 16.0), 1.0, "bicubic")
    torch.testing.assert_close(flipped, images.flip(-1))
    mixed = random_crops(images, (16.0, 16.0), 0.5, "bilinear")
    turned = (mixed - images).abs().amax((1, 2, 3)) > 1e-3
    assert 16 < turned.sum() < 48


def test_crops_have_the_areas_and_ratios_asked_for() -> None:
    torch.manual_seed(1)
    count, (h, w) = 4000, (32, 32)
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    images = torch.stack([x, y]).expand(count, 2, h, w)
    crops = random_crops(images, (0.25, 0.5), 0.0, "bilinear")
    width = crops[:, 0, 16, -1] - crops[:, 0, 16, 0]
    height = crops[:, 1, -1, 16] - crops[:, 1, 0, 16]
    area, ratio = width * height, width / height
    assert area.min() > 0.24
    assert area.max() < 0.51
    assert abs(float(area.mean()) - 0.375) < 0.01
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert abs(float(ratio.log().mean())) < 0.01
    left, right = crops[:, 0].amin((1, 2)), crops[:, 0].amax((1, 2))
    assert left.min() < 0.02
    assert right.max() > 0.98
    assert abs(float((left + right).mean()) - 1) < 0.02


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> NpzImages:
    path = tmp_path_factory.mktemp("device") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (22, 20, 20, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(22) % 3)
    return NpzImages(path)


def batches(images: NpzImages, seed: int = 0, rank: int = 0, world: int = 1) -> DeviceBatches:
    model = timm.create_model(
        "deit_tiny_slab_patch16_224", img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=1
    )
    config = DataConfig(
        source="npz", train=".", batch_size=4, on_device=True, auto_augment=None, color_jitter=0
    )
    device = torch.device("cpu")
    return DeviceBatches(
        images, config, model, seed=seed, device=device, rank=rank, world_size=world
    )


def test_a_batch_depends_on_seed_epoch_and_index_alone(images: NpzImages) -> None:
    first, again, other = batches(images), batches(images), batches(images, seed=1)
    assert len(first) == 5
    a = list(first)
    torch.rand(7)  # other draws do not matter
    b = list(again)
    assert all(torch.equal(x, y) and torch.equal(i, j) for (x, i), (y, j) in zip(a, b, strict=True))
    assert a[0][0].shape == (4, 3, 16, 16)
    assert not torch.equal(a[0][0], next(iter(other))[0])
    first.dataset.epoch = 1
    assert not torch.equal(a[0][0], next(iter(first))[0])


def test_processes_share_the_images_of_an_epoch(images: NpzImages) -> None:
    whole = torch.cat([labels for _, labels in batches(images)])
    shares = [batches(images, rank=rank, world=2) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    labels = [torch.cat([label for _, label in share]) for share in shares]
    assert torch.equal(torch.stack(labels, dim=1).flatten(), whole[:16])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "imagefolder"}, "`data.source` must be npz with data.on_device"),
        ({"auto_augment": "rand-m9"}, "`data.auto_augment` must be null with data.on_device"),
        ({"color_jitter": 0.4}, "`data.color_jitter` must be 0 with data.on_device"),
    ],
)
def test_what_works_on_single_images_only_is_refused(changes: dict, message: str) -> None:
    fields = {"source": "npz", "auto_augment": None, "color_jitter": 0, **changes}
    with pytest.raises(ValueError, match=message):
        DataConfig(train=".", on_device=True, **fields)
