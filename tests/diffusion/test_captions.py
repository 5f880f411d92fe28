"""Captioned images: both layouts, every image with its caption, every mistake named."""

import json

import pytest
from PIL import Image

from lintra.diffusion.training.captions import read_captions, read_prompts
from tiny_text import CAPTIONS, captioned_folder


@pytest.fixture
def folder(tmp_path):
    return captioned_folder(tmp_path / "images")


def write_metadata(folder, rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(text)


def test_text_files(folder):
    (folder / "more").mkdir()
    (folder / "0.png").rename(folder / "more" / "0.png")
    (folder / "0.txt").rename(folder / "more" / "0.txt")
    (folder / ".hidden.txt").write_text("not one of them")
    found = read_captions(folder)
    assert [item.name for item in found] == ["1", "2", "3", "4", "5", "6", "more/0"]
    assert [item.caption for item in found] == [*CAPTIONS[1:], CAPTIONS[0]]
    assert found[0].size() == (12, 24)
    assert found[0].read().shape == (3, 12, 24)


def test_metadata(folder):
    rows = [{"file_name": f"{n}.png", "text": f" {c} "} for n, c in enumerate(CAPTIONS)]
    write_metadata(folder, [*rows[::-1], ""])
    assert [item.caption for item in read_captions(folder)] == CAPTIONS
    write_metadata(folder, [{**row, "caption": "else"} for row in rows])
    assert {item.caption for item in read_captions(folder, "caption")} == {"else"}


def test_turned_photographs(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("turned")
    (item,) = read_captions(tmp_path)
    assert item.size() == (30, 10)
    assert item.read().shape == (3, 30, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "3.txt").unlink(), "must hold a caption for every image, got none for 3 "),
        (lambda f: (f / "3.png").unlink(), "must hold an image for every caption, got none for 3 "),
        (lambda f: (f / "3.txt").write_text(" \n"), "3.txt must hold a caption, got an empty"),
        (lambda f: (f / "3.txt").write_bytes(b"\xff\xfe"), "3.txt must be UTF-8 text"),
        (lambda f: (f / "3.jpg").write_bytes(b""), "must have one image a caption, got several"),
        (lambda f: write_metadata(f, [{"file_name": "0.png"}]), "jsonl:1 must have the texts"),
        (lambda f: write_metadata(f, ["{"]), "jsonl:1 must be a JSON object"),
        (
            lambda f: write_metadata(f, [{"file_name": "0.png", "text": "a"}] * 2),
            "jsonl:2 must name a new image, got 0.png again",
        ),
        (
            lambda f: write_metadata(f, [{"file_name": "0.png", "text": "a"}]),
            "a caption for every image, got none for 1.png, 2.png, 3.png and 3 more",
        ),
    ],
)
def test_errors(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        read_captions(folder)


def test_no_folder_and_no_images(tmp_path):
    with pytest.raises(ValueError, match="`path` must be an existing folder"):
        read_captions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`path` must hold .*png.* images, got"):
        read_captions(tmp_path)


def test_unreadable_images(folder):
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[:-200])
    with pytest.raises(ValueError, match="must hold readable images, got .*0.png"):
        read_captions(folder)[0].read()
    (folder / "0.png").write_bytes(b"text")
    with pytest.raises(ValueError, match="must hold readable images, got .*0.png"):
        read_captions(folder)[0].size()


def test_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \n")
    assert read_prompts(file) == ["a cat", "a dog"]
    file.write_text("\n")
    with pytest.raises(ValueError, match="`prompts` must hold at least one prompt"):
        read_prompts(file)
    with pytest.raises(ValueError, match="`prompts` must be an existing text file"):
        read_prompts(tmp_path / "nothing.txt")
