"""The latent cache: equal to encoding at once, bound to its VAE, whole or not there at all."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from lintra.diffusion.models.autoencoder_pixel import PixelAutoencoder
from lintra.diffusion.training.images import ImageSource, open_images
from lintra.diffusion.training.latent_cache import (
    LatentCache,
    build_latent_cache,
    weights_fingerprint,
)


def tiny_vae(seed: int = 0, **changes: object) -> AutoencoderKL:
    torch.manual_seed(seed)
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (8, 8),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.25,
        "shift_factor": 0.1,
        **changes,
    }
    return AutoencoderKL(**config)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_vae()


class FewDigits(ImageSource):
    """The first 11 digits."""

    def __init__(self, channels: int = 3, resolution: int = 32, fail_at: int | None = None) -> None:
        self._digits = open_images("digits", resolution=resolution, channels=channels)
        self.classes = self._digits.classes
        self.labels = self._digits.labels[:11]
        self.resolution, self.channels = resolution, channels
        self._fail_at = fail_at

    def __getitem__(self, index: int) -> dict:
        if index == self._fail_at:
            raise KeyboardInterrupt
        return self._digits[index]

    def _read(self, index: int) -> torch.Tensor:
        raise NotImplementedError


def build(folder: Path, vae: torch.nn.Module, source: ImageSource | None = None, **changes) -> Path:
    options = {
        "batch_size": 4,
        "device": "cpu",
        "vae_id": "tiny",
        "resolution": 32,
        "items_per_shard": 5,
        **changes,
    }
    return build_latent_cache(source or FewDigits(), vae, folder, **options)


@pytest.fixture(scope="module")
def built(vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("latents") / "cache", vae, random_flip=True)


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


@torch.no_grad()
def test_items_are_the_scaled_posterior(built: Path, vae: AutoencoderKL) -> None:
    cache = LatentCache(built, vae_fingerprint=weights_fingerprint(vae), resolution=32)
    source = FewDigits()
    assert (len(cache), cache.num_views, cache.latent_shape) == (11, 2, (4, 16, 16))
    assert cache.classes == source.classes
    assert torch.equal(cache.labels, source.labels)
    for index in (0, 4, 5, 10):
        image = source[index]["image"][None].float() / 127.5 - 1
        item = cache[index]
        for view, x in enumerate((image, image.flip(-1))):
            posterior = vae.encode(x).latent_dist
            torch.testing.assert_close(item["mean"][view], (posterior.mean[0] - 0.1) * 0.25)
            torch.testing.assert_close(item["std"][view], posterior.std[0] * 0.25)
        assert item["label"] == source.labels[index]
        assert item["mean"].dtype == torch.float32


def test_index_says_what_it_was_made_with(built: Path, vae: AutoencoderKL) -> None:
    index = json.loads((built / "index.json").read_text())
    assert index["vae_id"] == "tiny"
    assert index["vae_fingerprint"] == weights_fingerprint(vae)
    assert (index["resolution"], index["count"], index["dtype"]) == (32, 11, "float32")
    assert index["random_flip"] is True
    assert [shard["count"] for shard in index["shards"]] == [5, 5, 1]
    assert {file.name for file in built.iterdir()} == {
        "index.json",
        *(shard["file"] for shard in index["shards"]),
    }


def test_without_flips_there_is_one_view_and_half_precision_is_close(
    tmp_path: Path, vae: AutoencoderKL, built: Path
) -> None:
    cache = LatentCache(build(tmp_path / "half", vae, dtype=torch.bfloat16, items_per_shard=100))
    whole = LatentCache(built)
    item = cache[7]
    assert item["mean"].shape == (1, 4, 16, 16)
    assert item["mean"].dtype == torch.float32
    torch.testing.assert_close(item["mean"][0], whole[7]["mean"][0], rtol=1e-2, atol=1e-2)


def test_pixel_space_gives_the_images_back(tmp_path: Path) -> None:
    source = FewDigits(channels=1)
    cache = LatentCache(build(tmp_path / "pixels", PixelAutoencoder(in_channels=1), source))
    image = source[3]["image"].float() / 127.5 - 1
    torch.testing.assert_close(cache[3]["mean"][0], image)
    assert (cache[3]["std"] == 0).all()


def test_cache_works_in_order_from_the_end_and_in_workers(built: Path) -> None:
    cache = LatentCache(built)
    assert torch.equal(cache[-1]["mean"], cache[10]["mean"])
    with pytest.raises(IndexError, match="`index` must be below 11, got 11"):
        cache[11]
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy[6]["std"], cache[6]["std"])
    loader = DataLoader(cache, batch_size=3, num_workers=1, multiprocessing_context="fork")
    batches = list(loader)
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), cache.labels)
    assert torch.equal(batches[1]["mean"][0], cache[3]["mean"])


def test_fingerprint_follows_weights_and_dtype(vae: AutoencoderKL) -> None:
    fingerprint = weights_fingerprint(vae)
    assert len(fingerprint) == 16
    assert weights_fingerprint(tiny_vae()) == fingerprint
    assert weights_fingerprint(tiny_vae(seed=1)) != fingerprint
    assert weights_fingerprint(tiny_vae().half()) != fingerprint


def test_a_cache_of_another_vae_or_size_is_refused(built: Path, vae: AutoencoderKL) -> None:
    other = weights_fingerprint(tiny_vae(seed=1))
    mine = weights_fingerprint(vae)
    with pytest.raises(
        ValueError, match=rf"must be made with the VAE {other}, got .* {mine} \(tin"
    ):
        LatentCache(built, vae_fingerprint=other)
    with pytest.raises(ValueError, match="must be made at resolution 64, got 32"):
        LatentCache(built, resolution=64)


def test_damaged_caches_are_named(copied: Path) -> None:
    shard = copied / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"shard .*shard-00001.safetensors must be whole safetens"):
        LatentCache(copied)
    shard.unlink()
    with pytest.raises(
        ValueError, match=r"must hold the shard .*shard-00001.safetensors, got none"
    ):
        LatentCache(copied)
    shutil.copy(copied / "shard-00002.safetensors", shard)
    with pytest.raises(
        ValueError, match=r"latent shard .*shard-00001.safetensors must hold {'mean'"
    ):
        LatentCache(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 12}, "must hold 12 items, got 11"),
        ({"format_version": 0}, r"index.json must have format version 1, got 0"),
        ({"vae_id": None}, r"index.json must hold .*, missing \['vae_id'\]"),
    ],
)
def test_a_wrong_index_is_named(copied: Path, change: dict, message: str) -> None:
    file = copied / "index.json"
    index = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in index.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        LatentCache(copied)


def test_no_cache_and_no_json_are_named(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`folder` must be a latent cache with an index.json"):
        LatentCache(tmp_path / "nothing")
    (copied / "index.json").write_text('{"format')
    with pytest.raises(ValueError, match=r"index.json must be valid JSON, got"):
        LatentCache(copied)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, vae: AutoencoderKL) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", vae, FewDigits(fail_at=8))
    assert list(tmp_path.iterdir()) == []
    assert len(LatentCache(build(tmp_path / "cache", vae))) == 11


def test_the_folder_appears_only_when_it_is_complete(
    tmp_path: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(FewDigits):
        def __getitem__(self, index: int) -> dict:
            seen.append((tmp_path / "cache").exists())
            return super().__getitem__(index)

    build(tmp_path / "cache", vae, Watched())
    assert len(seen) == 11
    assert not any(seen)
    assert (tmp_path / "cache" / "index.json").is_file()


def test_a_folder_in_use_is_refused(built: Path, vae: AutoencoderKL) -> None:
    before = sorted(file.stat().st_mtime_ns for file in built.iterdir())
    with pytest.raises(ValueError, match="`folder` must not exist yet or be empty, got"):
        build(built, vae)
    assert sorted(file.stat().st_mtime_ns for file in built.iterdir()) == before


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, vae: AutoencoderKL
) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match="`source` must have images of side 64, got side 32"):
        build(folder, vae, resolution=64)
    with pytest.raises(ValueError, match="`source` must have the VAE's 3 channels, got 1"):
        build(folder, vae, FewDigits(channels=1))
    with pytest.raises(TypeError, match=r"`dtype` must be one of float32.*, got torch.float64"):
        build(folder, vae, dtype=torch.float64)
    assert list(tmp_path.iterdir()) == []


def test_latents_that_are_not_finite_stop_the_build(tmp_path: Path) -> None:
    broken = tiny_vae()
    torch.nn.init.constant_(broken.quant_conv.bias, torch.nan)
    with pytest.raises(ValueError, match=r"`vae` must give finite latents, .* in torch.float32"):
        build(tmp_path / "cache", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_vae_without_a_posterior_is_refused(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    blocks = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    with pytest.raises(
        TypeError, match="`vae` must give a Gaussian posterior, got AutoencoderTiny"
    ):
        build(tmp_path / "cache", AutoencoderTiny(**blocks))
    assert list(tmp_path.iterdir()) == []
