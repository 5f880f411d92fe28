"""A study of seconds of CLEAR from a FLUX: class names as prompts, distances to the teacher."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lintra.diffusion import ClearFluxTransformer2DModel, load_pipeline
from lintra.diffusion.sampling import sample_prompts
from lintra.diffusion.study import measure
from lintra.diffusion.study.config import TEACHER, Arm, Study, check_study
from lintra.diffusion.study.data import WordEmbeddings, make_cache, open_source, word_embeddings
from lintra.diffusion.study.evaluation import Evaluation
from lintra.diffusion.study.pack import pack_study, unpack_study
from lintra.diffusion.study.report import rows_of, write_report
from lintra.diffusion.study.worker import is_finished, train_and_measure
from lintra.diffusion.training.config import DataConfig
from lintra.diffusion.training.loop import Trainer
from lintra.diffusion.training.prompt_cache import PromptCache
from tiny_study import finish_study, make_clear_study, make_study


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study whose runs are all finished."""
    study = make_clear_study(tmp_path_factory.mktemp("done"))
    check_study(study)
    make_cache(study)
    finish_study(study)
    return study


def test_the_cache_holds_the_images_and_class_names(done: Study) -> None:
    cache, source = make_cache(done), open_source(done)
    assert isinstance(cache, PromptCache)
    assert len(cache) == len(source) == 297
    name, caption = cache.name_and_caption(5)
    assert (name, caption) == ("00000005", source.classes[source.labels[5]])
    views = cache[5]["mean"]
    assert views.shape == (2, 4, 4, 4)
    pixels = source[5]["image"].float() / 127.5 - 1
    unshuffled = [torch.pixel_unshuffle(view, 2) for view in (pixels, pixels.flip(-1))]
    torch.testing.assert_close(views, torch.stack(unshuffled))
    embeds = word_embeddings(done)([caption])
    assert torch.equal(cache[5]["prompt_embeds"], embeds["prompt_embeds"][0])
    assert torch.equal(cache[5]["pooled_prompt_embeds"], embeds["pooled_prompt_embeds"][0])
    assert not any(value.any() for value in cache.empty.values())


def test_words_are_fixed_vectors() -> None:
    encode = WordEmbeddings(tokens=2, channels=4, pooled_channels=3)
    rows = encode(["gas pump", "Gas", ""])
    embeds, pooled = rows["prompt_embeds"], rows["pooled_prompt_embeds"]
    assert embeds.shape == (3, 2, 4)
    assert pooled.shape == (3, 3)
    assert torch.equal(embeds[0, 0], embeds[1, 0])
    assert not torch.equal(embeds[0, 0], embeds[0, 1])
    assert not embeds[1, 1].any()
    assert not pooled[2].any()
    pump = encode(["pump"])["pooled_prompt_embeds"][0]
    torch.testing.assert_close(pooled[0], (pooled[1] + pump) / 2**0.5)
    # The same on every machine, or a packed teacher would not know its prompts.
    expected = torch.tensor([-0.25965, -0.00361, -2.26079, -0.31436])
    torch.testing.assert_close(embeds[1, 0], expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="`prompt_tokens` must be 3 for 'a b c', got 2"):
        encode(["a b c"])


def test_an_arm_of_no_steps_is_the_teacher_with_local_attention(done: Study) -> None:
    start = load_pipeline(done.pipeline("linearised", 0)).transformer
    assert isinstance(start, ClearFluxTransformer2DModel)
    assert start.config.radius == 1
    teacher = load_pipeline(done.pipeline(TEACHER, 8)).transformer.state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in start.state_dict().items())
    trained = load_pipeline(done.pipeline("clear", 4)).transformer.state_dict()
    changed = {name for name, value in trained.items() if not torch.equal(value, teacher[name])}
    assert changed
    assert all(".attn.to_" in name for name in changed)


def test_runs_are_compared_with_their_teacher(done: Study) -> None:
    rows = {row.run: row for row in rows_of(done)}
    assert [(row.run, row.step) for row in rows.values()] == [
        (TEACHER, 8),
        ("linearised", 0),
        ("clear", 4),
    ]
    assert rows[TEACHER].cells["RMS to teacher"] is None
    assert rows["linearised"].cells["loss"] is None
    for run in ("linearised", "clear"):
        cells = rows[run].cells
        assert cells["RMS to teacher"] > 0
        assert cells["Frechet to teacher"] < cells["Frechet distance"]
        assert 0 < cells["cosine to teacher"] <= 1
        assert cells["images/s eager"] > 0


def test_the_report_can_be_published(done: Study, tmp_path: Path) -> None:
    file = tmp_path / "results" / "clear.md"
    text = write_report(done, "the command", {}, file)
    assert text.startswith("# CLEAR on digits\n\nWhat this is.\n\n| run | steps |")
    assert "20 samples each from the same noise, the pipeline's sampler, 2 steps, classi" in text
    assert "Two samples of the teacher of one class from different noise are" in text
    assert "Loss: the flow-matching term" in text
    assert "images/s compiled" not in text
    assert "![samples](samples.png)" in text
    published = file.read_text()
    assert published == text.replace("](", "](clear_").replace("![", "![clear ")
    assert {path.name for path in file.parent.iterdir()} == {
        "clear.md",
        "clear_samples.png",
        "clear_loss.png",
    }


def test_a_packed_study_goes_on_elsewhere(done: Study, tmp_path: Path) -> None:
    """The cache and the teacher's samples are made anew; the teacher comes in half precision."""
    pack_study(done, tmp_path / "pack", limit=10**8)
    elsewhere = make_clear_study(tmp_path)
    unpack_study(tmp_path / "pack", Path(elsewhere.output_dir))
    assert all(is_finished(elsewhere, run) for run in elsewhere.runs)
    with pytest.raises(ValueError, match="`data.path` must exist, got"):
        elsewhere.recipe(TEACHER)
    make_cache(elsewhere)
    assert write_report(elsewhere, "", {}) == write_report(done, "", {})
    more = replace(elsewhere, arms={"more": Arm(title="more", lengths=[0.25])})
    assert not list(more.folder(TEACHER).glob("samples-*"))
    assert train_and_measure(more, "more") is None
    again = load_file(more.folder(TEACHER) / "samples-8.safetensors")["images"]
    before = load_file(done.folder(TEACHER) / "samples-8.safetensors")["images"]
    assert (again.float() - before.float()).abs().mean() < 2


def test_a_stopped_student_is_packed_without_its_checkpoint(done: Study, tmp_path: Path) -> None:
    study = replace(done, output_dir=str(tmp_path / "study"))
    study.cache.parent.mkdir()
    study.cache.symlink_to(done.cache)
    study.folder(TEACHER).symlink_to(done.folder(TEACHER))
    recipe = study.recipe("clear")
    keep = replace(recipe.checkpoint, checkpointing_steps=2)
    Trainer(replace(recipe, checkpoint=keep)).run()
    (study.folder("clear") / "pipeline" / "recipe.json").unlink()
    pack_study(study, tmp_path / "pack", limit=10**8)
    unpack_study(tmp_path / "pack", tmp_path / "new")
    assert not list((tmp_path / "new" / "clear").glob("checkpoint-*"))


def test_samples_depend_on_their_seed_alone_and_guidance_counts(done: Study) -> None:
    pipeline = load_pipeline(done.pipeline(TEACHER, 8))
    encode = word_embeddings(done)
    empty = {name: value[0] for name, value in encode([""]).items()}
    prompts = encode(["3", "4", "5"])
    options = {"num_inference_steps": 2, "seed": 7}
    images = sample_prompts(pipeline, prompts, empty, (8, 8), **options, batch_size=2)
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.uint8
    last = {name: value[2:] for name, value in prompts.items()}
    alone = sample_prompts(pipeline, last, empty, (8, 8), **{**options, "seed": 9})
    assert (images[2:].float() - alone.float()).abs().max() <= 1
    guided = sample_prompts(pipeline, prompts, empty, (8, 8), **options, guidance_scale=30.0)
    assert not torch.equal(images, guided)


def test_samples_of_another_number_are_drawn_anew(done: Study) -> None:
    fewer = replace(done, evaluation=replace(done.evaluation, num_images=10))
    images = measure._teacher_samples(fewer, open_source(fewer))
    assert len(images) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": Evaluation()}, "`evaluation.scheduler` must be none for prompts, got 'dpm"),
        (
            {"images": DataConfig(source="prompt_cache")},
            "`images.source` must be labelled images, got 'prompt_cache'",
        ),
        ({"images": DataConfig(source="npz")}, "`data_path` must exist, got None"),
        ({"data_path": "/nowhere"}, "`data_path` must exist, got '/nowhere'"),
        (
            {"arms": {"clear": Arm(title="", lengths=[0.25, 0.5])}},
            "`arms.clear.lengths` must be one where not all weights learn, got ",
        ),
        ({"images": None}, "`images` must be given for a teacher that is a flux, got None"),
    ],
)
def test_wrong_studies(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check_study(make_clear_study(tmp_path, **changes))


def test_classes_take_no_prompts(tmp_path: Path) -> None:
    evaluation = replace(make_study(tmp_path).evaluation, scheduler=None)
    study = make_study(tmp_path, images=DataConfig(resolution=8), evaluation=evaluation)
    with pytest.raises(ValueError, match="`images` must be none for a teacher that is a dit, got"):
        check_study(study)
    assert make_cache(make_study(tmp_path)) is None


def test_a_teacher_must_say_how_wide_its_prompts_are(tmp_path: Path) -> None:
    config = {"model.config": {"in_channels": 16}}
    with pytest.raises(ValueError, match="`teacher` must have joint_attention_dim in its config"):
        word_embeddings(make_clear_study(tmp_path, teacher_set=config))
