"""Inpainting and outpainting from the command line: only what is white changes, and a picture is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fluxonnx.cli import main
from fluxonnx.runtime.metadata import read_parameters
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
DEMO_MODEL = Path(__file__).parent.parent / "models/tiny-klein"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(values).save("in.png")
    mask = Image.new("L", (128, 96))
    ImageDraw.Draw(mask).ellipse((30, 20, 90, 70), fill=255)
    mask.save("in-mask.png")
    return tmp_path


@pytest.fixture
def model(checkpoints) -> str:
    return str(checkpoints.exported(CASE))


@pytest.fixture
def generate(model, folder):
    """generate(*arguments) runs the command in `folder`; -q, two steps."""

    def generate(*arguments: object) -> int:
        return main(["generate", "-q", "-d", model, "-s", "2", *map(str, arguments)])

    return generate


def pixels(name: str) -> np.ndarray:
    with Image.open(name) as image:
        return np.asarray(image.convert("RGB"))


INPAINT = ["-p", "a", "-i", "in.png", "--mask", "in-mask.png", "-S", 3]


@pytest.mark.parametrize(
    "flags",
    [
        ["--mask-blur", 3],
        ["-t", 0.5, "-r", "in.png"],
        ["--mask-crop"],
        ["--no-keep-unmasked"],
        ["--expand", "16,0,32,16"],
    ],
    ids=lambda flags: flags[0],
)
def test_made_again_byte_for_byte(generate, model, flags):
    assert generate(*INPAINT, *flags, "-o", "a.png") == 0
    assert main(["generate", "-q", "-d", model, "--from", "a.png", "-o", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert read_parameters("a.png")["mask_file"] == "in-mask.png"


def test_only_the_white_part_changes(generate):
    assert generate(*INPAINT, "-o", "a.png") == 0
    white = pixels("in-mask.png")[..., 0] == 255
    assert np.array_equal(pixels("a.png")[~white], pixels("in.png")[~white])
    assert (pixels("a.png")[white] != pixels("in.png")[white]).any(-1).mean() > 0.9
    assert read_parameters("a.png")["strength"] == 1


def test_a_crop_keeps_a_photo_of_any_size(generate):
    values = np.random.default_rng(1).integers(0, 256, (203, 301, 3), np.uint8)
    Image.fromarray(values).save("in-large.png")
    assert (
        generate("-p", "a", "-i", "in-large.png", "--mask", "in-mask.png", "--mask-crop", 4, "-W", 96, "-o", "a.png")
        == 0
    )
    assert pixels("a.png").shape == values.shape


def test_a_line_of_a_prompt_file_names_its_pictures(generate):
    lines = [
        {"prompt": "a", "input": "in.png", "mask": "in-mask.png", "seed": 3, "output": "a.png"},
        {"prompt": "b", "input": ["in.png", "in-mask.png"], "seed": 3, "output": "b.png"},
        {"prompt": "c", "input": "in.png", "strength": 0.5, "seed": 3, "output": "c.png"},
    ]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert generate("--prompt-file", "in.jsonl") == 0
    found = [read_parameters(name) for name in ("a.png", "b.png", "c.png")]
    assert found[0]["mask_file"] == "in-mask.png"
    assert found[1]["reference_files"] == ["in.png", "in-mask.png"]
    assert (found[2]["image_file"], found[2]["strength"]) == ("in.png", 0.5)
    assert generate(*INPAINT, "-o", "d.png") == 0
    assert Path("a.png").read_bytes() == Path("d.png").read_bytes()


@pytest.mark.parametrize(
    ("code", "pattern", "arguments"),
    [
        (2, "give the picture with -i", ["-p", "a", "--mask", "in-mask.png"]),
        (2, "give the picture with -i", ["-p", "a", "--expand", "16,0,0,0"]),
        (2, "give one -i", ["-p", "a", "-i", "in.png", "-i", "in.png", "--mask", "in-mask.png"]),
        (1, "absent.png does not exist", ["-p", "a", "-i", "in.png", "--mask", "absent.png"]),
        (1, "in.txt is not an image", ["-p", "a", "-i", "in.png", "--mask", "in.txt"]),
        (2, "the mask has no white part", ["-p", "a", "-i", "in.png", "--mask", "in-black.png"]),
        (2, "mask_blur is -1.0, but must be from 0", [*INPAINT, "--mask-blur", "-1"]),
        (2, "mask_crop is 5000, but must be from 0", [*INPAINT, "--mask-crop", "5000"]),
        (2, "mask_blur says how a mask is used, but there is none", ["-p", "a", "--mask-blur", "2"]),
        (2, "each from 0 to 4096", ["-p", "a", "-i", "in.png", "--expand", "5000,0,0,0"]),
        (2, "adds nothing", ["-p", "a", "-i", "in.png", "--expand", "0,0,0,0"]),
        (2, "size 'big' is unknown", ["-p", "a", "-i", "in.png", "--size", "big"]),
        (2, "there is none: give one", ["-p", "a", "--size", "input"]),
        (2, "1000x700 can't be drawn.*-W 1008 -H 704", ["-p", "a", "-W", "1000", "-H", "700"]),
        (2, "4 megapixels", ["-p", "a", "-W", "4096", "-H", "4096"]),
        (2, "reference_area is 9.0, but must be from 0.0625", ["-p", "a", "-r", "in.png", "--reference-area", "9"]),
        (2, "in.csv, line 1 has no column", ["--prompt-file", "in.csv"]),
    ],
)
def test_wrong_flags(model, folder, fails, code, pattern, arguments):
    Path("in.txt").write_text("no picture")
    Path("in.csv").write_text("seed\n1\n")
    Image.new("L", (128, 96)).save("in-black.png")
    fails(code, pattern, "generate", "-q", "-d", model, *arguments)


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "", "1,2,3,4,5", "64"])
def test_borders_that_are_not_four_numbers(model, capsys, text):
    with pytest.raises(SystemExit) as error:
        main(["generate", "-d", model, "-p", "a", "-i", "in.png", "--expand", text])
    assert error.value.code == 2
    assert f"argument --expand: '{text}' is not four numbers of pixels" in capsys.readouterr().err


def test_a_trained_model_draws_what_was_asked_for_where_the_mask_is_white(folder):
    """The demo model puts a star into the right half of a circle's picture; the left half stays as it is."""
    shutil.copytree(DEMO_MODEL, "in-model", ignore=shutil.ignore_patterns("training", "*.png"))
    command = ["generate", "-q", "-d", "in-model"]
    assert main([*command, "-p", "a red circle on a blue background", "-S", "42", "-o", "circle.png"]) == 0
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    mask.save("in-square.png")
    words = ["-i", "circle.png", "--mask", "in-square.png", "-S", "1", "-o", "green.png"]
    assert main([*command, "-p", "a green circle on a blue background", *words]) == 0
    before, after = pixels("circle.png").astype(int), pixels("green.png").astype(int)
    white = np.asarray(mask) == 255
    assert np.array_equal(before[~white], after[~white])
    red, green, blue = after[60:68, 60:68].mean((0, 1))
    assert before[64, 64, 0] > 180
    assert green > red
    assert green > blue
