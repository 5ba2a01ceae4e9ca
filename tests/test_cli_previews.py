"""Previews and animations of the steps, from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageSequence

from fluxonnx.cli import main
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")


@pytest.fixture
def generate(checkpoints, tmp_path, monkeypatch):
    """generate(*arguments) runs the command in an empty folder, for small pictures of three steps."""
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
    Image.fromarray(values).save("in.png")
    mask = Image.new("L", (64, 96))
    ImageDraw.Draw(mask).rectangle((0, 0, 31, 31), fill=255)
    mask.save("in-mask.png")
    model = str(checkpoints.exported(CASE))

    def generate(*arguments: object, size: tuple[int, int] = (64, 96)) -> int:
        words = ["-W", size[0], "-H", size[1], "-s", 3, "-p", "a", *arguments]
        return main(["generate", "-q", "-d", model, *map(str, words)])

    return generate


def names() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*.*") if not path.name.startswith("in"))


@pytest.mark.parametrize("method", ["fast", "vae"])
def test_a_folder_of_previews(generate, method):
    assert generate("-S", 7, "-o", "a.png") == 0
    assert generate("-S", 7, "-o", "b.png", "--preview", "steps/of", "--preview-method", method) == 0
    assert names() == ["a.png", "b.png", *(f"steps/of/b-7-step-0{i}.png" for i in (1, 2, 3))]
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert {Image.open(name).size for name in names()[2:]} == {(32, 48)}


def test_a_file_that_each_step_replaces(generate):
    assert generate("-S", 7, 8, "-o", "a.png", "--preview", "p.jpg") == 0
    assert names() == ["a-0001.png", "a-0002.png", "p.jpg"]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation(generate, suffix):
    assert generate("-S", 7, "-o", "a.png", "--animate", f"a.{suffix}") == 0
    with Image.open(f"a.{suffix}") as animation, Image.open("a.png") as picture:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]
        assert [frame.size for frame in frames] == [picture.size] * 4
        assert np.abs(np.asarray(frames[-1], int) - np.asarray(picture, int)).mean() < 20  # noise, badly packed
    assert generate("-S", 7, 8, "-o", "b.png", "--animate", f"b.{suffix}") == 0
    assert f"b-0002.{suffix}" in names()


def test_previews_show_what_a_mask_keeps(generate):
    """Also if only its neighbourhood is drawn."""
    words = ["-S", 7, "-i", "in.png", "--mask", "in-mask.png", "--preview", "p.png", "-o", "a.png"]
    for others in ([], ["--mask-crop", 8]):
        assert generate(*words, *others) == 0
        with Image.open("p.png") as preview, Image.open("in.png") as photo:
            expected = np.asarray(photo.resize((32, 48), Image.Resampling.BOX))
            assert np.array_equal(np.asarray(preview)[17:], expected[17:])
            assert not np.array_equal(np.asarray(preview)[:15, :15], expected[:15, :15])


def test_strength_0_has_no_steps(generate):
    assert generate("-i", "in.png", "-t", 0, "--preview", "p", "--animate", "a.gif", "-o", "a.png") == 0
    assert names() == ["a.gif", "a.png"]


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("give --preview or --animate", ["--preview-method", "vae"]),
        ("preview method 'x' is unknown: choose one of fast, vae", ["--preview", "p", "--preview-method", "x"]),
        ("preview p.txt is neither a folder nor a picture", ["--preview", "p.txt"]),
        ("previews can't be written: .*in.png", ["--preview", "in.png/p"]),
        ("folder no does not exist", ["--preview", "no/p.png"]),
        ("a.png can't be written: the name must end in one of .gif, .webp", ["--animate", "a.png"]),
        ("folder no does not exist", ["--animate", "no/a.gif"]),
    ],
)
def test_wrong_flags(generate, capsys, pattern, arguments):
    assert generate(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert pattern.split(".*")[0] in line
    assert names() == []
