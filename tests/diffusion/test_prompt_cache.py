"""The prompt cache: what the encoders give, bound to them, resumable, checked when opened."""

import json
import pickle
import shutil

import pytest
import torch

from lintra.diffusion.training import prompt_cache_build
from lintra.diffusion.training.buckets import fit_to_bucket
from lintra.diffusion.training.captions import read_captions
from lintra.diffusion.training.latent_cache import weights_fingerprint
from lintra.diffusion.training.memory import InMemoryPrompts
from lintra.diffusion.training.prompt_cache import PromptCache, describe
from lintra.diffusion.training.prompt_cache_build import (
    build_prompt_cache,
    build_teacher_cache,
    pipeline_encoders,
)
from lintra.diffusion.training.text_pipelines import (
    encode_prompts,
    encoder_fingerprints,
    folder_fingerprint,
    open_encoders,
)
from tiny_models import pixel_pipeline, tiny_dit
from tiny_text import CAPTIONS, captioned_folder, tiny_text_pipeline

BUCKETS = [(8, 16), (16, 16)]
SHAPES = {
    "flux": {"prompt_embeds": (8, 12), "pooled_prompt_embeds": (8,)},
    "sd3": {"prompt_embeds": (24, 12), "pooled_prompt_embeds": (8,)},
    "pixart": {"prompt_embeds": (8, 12), "prompt_attention_mask": (8,)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipeline folder of each family."""
    paths = {family: tmp_path_factory.mktemp(family) for family in SHAPES}
    for family, path in paths.items():
        tiny_text_pipeline(family).save_pretrained(path)
    return paths


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return read_captions(captioned_folder(tmp_path_factory.mktemp("images")))


def opened(folder, **options):
    return open_encoders(folder, dtype=torch.float32, **options)


def build(pipeline, folder, images, origin, length=8, **changes):
    options = {"buckets": BUCKETS, "batch_size": 2, "items_per_shard": 3, **changes}
    encoders = pipeline_encoders(pipeline, origin, length)
    return build_prompt_cache(encoders, folder, images, **options)


@pytest.fixture(scope="module")
def built(folders, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "pixart"
    build(opened(folders["pixart"]), folder, images, folders["pixart"], random_flip=True)
    return folder


@pytest.fixture
def copied(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


@torch.no_grad()
@pytest.mark.parametrize("family", SHAPES)
def test_rows_are_what_the_encoders_give(folders, images, family, tmp_path):
    pipeline = opened(folders[family])
    assert pipeline.transformer is None
    cache = build(pipeline, tmp_path / "cache", images, folders[family])
    assert len(cache) == 7
    assert cache.buckets == BUCKETS
    assert cache.bucket_of.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert {name: tuple(value.shape) for name, value in cache.empty.items()} == SHAPES[family]
    by_name = {item.name: item for item in images}
    for index in range(7):
        name, caption = cache.name_and_caption(index)
        assert caption == CAPTIONS[int(name)]
        row = cache[index]
        for key, value in encode_prompts(pipeline, [caption], 8).items():
            torch.testing.assert_close(row.pop(key), value[0])
        pixels = fit_to_bucket(by_name[name].read(), BUCKETS[cache.bucket_of[index]])
        posterior = pipeline.vae.encode(pixels[None] / 127.5 - 1).latent_dist
        torch.testing.assert_close(row.pop("mean"), (posterior.mean - 0.1) * 0.5)
        torch.testing.assert_close(row.pop("std"), posterior.std * 0.5)
        assert row == {}


def test_half_precision_keeps_latents_in_float32(folders, images, tmp_path):
    pipeline = open_encoders(folders["flux"], dtype=torch.bfloat16)
    row = build(pipeline, tmp_path / "cache", images[:1], folders["flux"])[0]
    assert row["prompt_embeds"].dtype == torch.bfloat16
    assert row["mean"].dtype == torch.float32


def test_mirrored_views(built):
    row = PromptCache(built)[3]
    assert row["mean"].shape == (2, 4, 8, 8)
    assert not torch.equal(row["mean"][0], row["mean"][1])


@pytest.mark.parametrize("family", SHAPES)
def test_the_teacher_draws_alike_in_any_batch(folders, family, tmp_path):
    pipeline = opened(folders[family], with_transformer=True)
    encoders = pipeline_encoders(pipeline, folders[family], 8)
    options = {"buckets": BUCKETS, "num_inference_steps": 2, "guidance_scale": 2.0, "seed": 5}
    caches = [
        build_teacher_cache(
            pipeline, encoders, tmp_path / str(size), CAPTIONS, batch_size=size, **options
        )
        for size in (1, 2)
    ]
    assert caches[0].bucket_of.tolist() == [0, 0, 0, 0, 1, 1, 1]
    for row, other in zip(*caches, strict=True):
        assert set(row) == {"mean", *SHAPES[family]}
        torch.testing.assert_close(row["mean"], other["mean"], rtol=1e-4, atol=1e-4)
    assert caches[0].index["source"] == {
        "kind": "teacher",
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "seed": 5,
    }
    if family == "flux":
        size = {"height": 8, "width": 16, "num_inference_steps": 2, "guidance_scale": 2.0}
        generator = torch.Generator().manual_seed(7)
        image = pipeline(
            CAPTIONS[2], **size, max_sequence_length=8, generator=generator, output_type="latent"
        ).images
        unpacked = pipeline._unpack_latents(image, 8, 16, 2)
        torch.testing.assert_close(caches[0][1]["mean"], unpacked, rtol=1e-4, atol=1e-4)


def test_an_interrupted_build_goes_on(folders, images, built, tmp_path, monkeypatch):
    pipeline = opened(folders["pixart"])
    folder = tmp_path / "cache"
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:  # in the second shard
            raise KeyboardInterrupt
        return encode_prompts(*arguments)

    monkeypatch.setattr(prompt_cache_build, "encode_prompts", counted)
    with pytest.raises(KeyboardInterrupt):
        build(pipeline, folder, images, folders["pixart"], random_flip=True)
    assert not folder.exists()
    partial = tmp_path / ".cache.partial"
    first = (partial / "shard-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="must be made by the call that began it, got other items"):
        build(pipeline, folder, images[:-1], folders["pixart"], random_flip=True)
    # As after a crash of the machine: a file that is not whole.
    (partial / "shard-00001.safetensors").write_bytes(b"123")
    cache = build(pipeline, folder, images, folders["pixart"], random_flip=True)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert {file.name for file in folder.iterdir()} == {file.name for file in built.iterdir()}
    for row, other in zip(cache, PromptCache(built), strict=True):
        assert all(torch.equal(row[name], other[name]) for name in other)
    with pytest.raises(ValueError, match="`folder` must not exist yet or be empty"):
        build(pipeline, folder, images, folders["pixart"])


def test_origin_is_checked(folders, built, tmp_path):
    pipeline = opened(folders["pixart"])
    vae = weights_fingerprint(pipeline.vae)
    encoders = encoder_fingerprints(folders["pixart"], "pixart")
    cache = PromptCache(built, family="pixart", vae_fingerprint=vae, text_encoders=encoders)
    assert str(folders["pixart"]) in describe(cache)
    assert "16 x 16: 4" in describe(cache)
    with pytest.raises(ValueError, match="must be made for flux, got pixart"):
        PromptCache(built, family="flux")
    with pytest.raises(ValueError, match=f"with the VAE 0123, got one made with {vae}"):
        PromptCache(built, vae_fingerprint="0123")
    other = tmp_path / "other"
    tiny_text_pipeline("pixart", seed=1).save_pretrained(other)
    others = encoder_fingerprints(other, "pixart")
    assert others.keys() == encoders.keys()
    with pytest.raises(ValueError, match=r"with the text encoders .*, got one made with"):
        PromptCache(built, text_encoders=others)


def test_a_fingerprint_does_not_mind_how_files_are_split(folders, tmp_path):
    encoder = opened(folders["pixart"]).text_encoder
    encoder.save_pretrained(tmp_path / "split", max_shard_size="2KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    whole = folder_fingerprint(folders["pixart"] / "text_encoder")
    assert folder_fingerprint(tmp_path / "split") == whole
    with pytest.raises(ValueError, match="`folder` must hold safetensors weights"):
        folder_fingerprint(tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="must be whole safetensors"):
        folder_fingerprint(tmp_path)


def test_the_whole_cache_in_memory(built):
    cache = PromptCache(built)
    held = InMemoryPrompts(cache)
    assert len(held) == len(cache)
    assert len(held.bucket_of.unique()) == 2
    for index in range(len(cache)):
        row, expected = held[index], cache[index]
        assert row.keys() == expected.keys()
        assert all(torch.equal(row[name], expected[name]) for name in row)
    items = (cache.bucket_of == 1).nonzero().flatten().tolist()
    batch = next(iter(held.batches([[items[1], items[0]]])))
    expected = torch.utils.data.default_collate([cache[items[1]], cache[items[0]]])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_worker_processes(built):
    cache = PromptCache(built)
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy[-1]["mean"], cache[6]["mean"])
    with pytest.raises(IndexError, match="`index` must be below 7, got 7"):
        cache[7]


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: _truncate(f / "shard-00001.safetensors"), "00001.safetensors must be whole"),
        (lambda f: (f / "shard-00001.safetensors").unlink(), "must hold the shard .*, got none"),
        (
            lambda f: shutil.copy(f / "shard-00000.safetensors", f / "shard-00001.safetensors"),
            r"shard .*00001.safetensors must hold {'mean': \[3, 2, 4, 8, 8\]",
        ),
        (lambda f: (f / "empty.safetensors").unlink(), "must hold the shard .*empty.safetensors"),
        (
            lambda f: shutil.copy(f / "shard-00000.safetensors", f / "empty.safetensors"),
            "empty.safetensors must hold",
        ),
        (lambda f: (f / "index.json").unlink(), "must be a prompt cache with an index.json"),
        (lambda f: (f / "index.json").write_text("{}"), "index.json must hold format_version"),
    ],
)
def test_damage_is_named(copied, change, message):
    change(copied)
    with pytest.raises(ValueError, match=message):
        PromptCache(copied)


def test_a_wrong_count_is_named(copied):
    index = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps({**index, "count": 8}))
    with pytest.raises(ValueError, match="must hold 8 items, got 7"):
        PromptCache(copied)


def test_what_does_not_fit(folders, images, tmp_path):
    pipeline = opened(folders["flux"])

    def fails(message, **changes):
        with pytest.raises(ValueError, match=message):
            build(pipeline, tmp_path / "cache", images, folders["flux"], **changes)

    fails("sides that are multiples of 4 for this model, got 10 x 8", buckets=[(10, 8)])
    fails("`items_per_shard` must be at least 1, got 0", items_per_shard=0)
    fails("`batch_size` must be at least 1, got 0", batch_size=0)
    fails("`max_sequence_length` must be at least 1, got 0", length=0)
    torch.nn.init.constant_(pipeline.vae.quant_conv.bias, torch.nan)
    fails("must give finite mean, got others from its VAE")
    assert not (tmp_path / "cache").exists()


def test_other_pipelines_are_refused(tmp_path):
    pixel_pipeline(tiny_dit(in_channels=1, out_channels=2)).save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match="`pipeline` must be one of FluxPipeline, .* DiTPipeline"):
        open_encoders(tmp_path / "dit", dtype=torch.float32)
    pipeline = tiny_text_pipeline("flux")
    pipeline.register_modules(text_encoder_2=None)
    pipeline.save_pretrained(tmp_path / "flux")
    with pytest.raises(ValueError, match="`pipeline` must have a text_encoder_2, got None"):
        open_encoders(tmp_path / "flux", dtype=torch.float32)
