"""`lintra make-cache` as a person calls it."""

import pytest

from lintra.diffusion.training.prompt_cache import PromptCache
from lintra.tools import make_cache
from tiny_text import CAPTIONS, captioned_folder, tiny_text_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_text_pipeline("flux").save_pretrained(folder)
    return folder


SMALL = ["--max_sequence_length=8", "--dtype=fp32", "--device=cpu"]


def test_images(pipeline, tmp_path, capsys):
    images = captioned_folder(tmp_path / "images")
    words = [str(pipeline), str(tmp_path / "cache"), f"--images={images}", *SMALL]
    words += ["--aspect_ratio_buckets=16,16;8,16", "--random_flip=true", "--items_per_shard=2"]
    assert make_cache.main(words) == 0
    assert "7 items for flux from images" in capsys.readouterr().out
    assert PromptCache(tmp_path / "cache").num_views == 2
    assert make_cache.main(words) == 2
    assert "error: `folder` must not exist yet" in capsys.readouterr().err
    (images / "1.txt").unlink()
    assert make_cache.main(words) == 2
    assert "a caption for every image, got none for 1 " in capsys.readouterr().err


def test_from_teacher(pipeline, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS[:3]))
    words = [str(pipeline), str(tmp_path / "cache"), f"--from_teacher={prompts}", *SMALL]
    assert make_cache.main([*words, "--resolution=16", "--num_inference_steps=2"]) == 0
    assert "3 items for flux from teacher" in capsys.readouterr().out
    assert PromptCache(tmp_path / "cache")[0]["mean"].shape == (1, 4, 8, 8)


def test_errors(pipeline, tmp_path, capsys):
    words = [str(pipeline), str(tmp_path / "cache")]
    for more, message in (
        ([], "either `images` or `from_teacher` must be given"),
        (["--images=a", "--from_teacher=b"], "either `images` or `from_teacher` must be given"),
        (["--images=a", "--dtype=int8"], "`dtype` must be one of fp32, bf16, fp16, got 'int8'"),
    ):
        with pytest.raises(SystemExit):
            make_cache.main([*words, *more])
        assert message in capsys.readouterr().err
    assert make_cache.main([*words, "--images=/nowhere"]) == 2
    assert "error: `path` must be an existing folder" in capsys.readouterr().err
    assert make_cache.main([str(tmp_path), "x", f"--images={captioned_folder(tmp_path)}"]) == 2
    assert "error: `path` must be a pipeline folder" in capsys.readouterr().err
