"""What a program may pass: pictures of any kind and numbers that are clear; typed errors for the rest."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.errors import FluxonnxError, ImageError, UsageError
from fluxonnx.runtime.request import Request, resolve
from tests.support import Case

RGB = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
OPAQUE = np.dstack([RGB, np.full((64, 80), 255, np.uint8)])


def resolved(**values):
    return resolve(Request(**{"prompt": "a", **values}), True, 16, warn=lambda message: None)


@pytest.fixture
def file(tmp_path) -> Path:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def forms(file: Path) -> list:
    return [Image.fromarray(RGB), RGB, OPAQUE, np.asfortranarray(RGB), file, str(file), Image.open(file)]


def test_one_picture_in_all_forms(file):
    for value in forms(file):
        found = resolved(image=value)
        assert found.image.mode == "RGB"
        assert np.array_equal(found.image, RGB)


def test_several_or_one_bare(file):
    for value in forms(file):
        for references in (value, [value], (value,), iter([value])):
            (found,) = resolved(references=references).references
            assert np.array_equal(found, RGB)


def test_gray_array():
    found = resolved(image=RGB[..., 0])
    assert np.array_equal(found.image, np.dstack([RGB[..., 0]] * 3))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "of type int"),
        (b"a.png", "of type bytes"),
        (object(), "of type object"),
        ({}, "of type dict"),
        (RGB / 255, r"array of float64, expected uint8: convert it with \(array \* 255\)"),
        (RGB.astype(np.int32), "array of int32, expected uint8"),
        (RGB > 7, "array of bool"),
        (RGB[None], r"shape \[1, 64, 80, 3\]"),
        (RGB[..., :2], r"shape \[64, 80, 2\]"),
        (RGB[0, 0], r"shape \[3\]"),
        (RGB[:0], "no pixels"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        ("nowhere.png", "nowhere.png"),
        (Path(__file__), "test_inputs.py"),
        ("a\0b.png", "a"),
        ("", "can't|is"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\0" not in value else type(value).__name__,
)
def test_no_picture(value, message):
    for values in ({"image": value}, {"references": [value]}):
        with pytest.raises(FluxonnxError, match=message) as found:
            resolved(**values)
        assert "\n" not in str(found.value)


def test_no_pictures():
    for value in (5, {}, None):
        with pytest.raises(UsageError, match="the images are of type"):
            resolved(references=value)


def test_picture_that_turns_out_damaged(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"a\.png can't be read"):
        resolved(image=Image.open(file))


@pytest.mark.parametrize("value", [80, 80.0, np.int64(80), np.float32(80), np.uint8(80), Fraction(80)])
def test_clear_integers(value):
    found = resolved(width=value, steps=value)
    assert (found.width, type(found.width), found.steps, type(found.steps)) == (80, int, 80, int)


@pytest.mark.parametrize(
    "values",
    [{"width": value} for value in ("80", 80.5, float("nan"), float("inf"), True, [80], 10**5000, np.array([80]))]
    + [{"prompt": value} for value in (5, None, b"a", ["a"])]
    + [{"strength": value} for value in ("0.5", True, 10**400)]
    + [{"sigmas": value, "schedule": "custom"} for value in (5, "0.5", ["a"], [10**5000], [], {})]
    + [{"sampler": value} for value in (5, ["euler"], "x\ny")]
    + [{"tile": 1.5}, {"max_sequence_length": "8"}, {"steps": 1e30}],
    ids=lambda values: "-".join(values),
)
def test_unclear_values(values):
    with pytest.raises(UsageError) as found:
        resolved(**values)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500


def test_numbers_of_numpy_become_pythons():
    """JSON, in which they are written into the picture, has no others."""
    found = resolved(schedule="custom", sigmas=np.array([1, 0.5], np.float32))
    assert found.sigmas == (1.0, 0.5)
    assert [type(sigma) for sigma in found.sigmas] == [float, float]


@pytest.mark.slow
def test_flux_takes_them(checkpoints, file):
    with fluxonnx.load(checkpoints.exported(Case("odd-heads"))) as flux:
        expected = flux.edit("x", [Image.fromarray(RGB)], seed=1)
        assert expected.tobytes() == flux.edit("x", [str(file)], seed=1.0).tobytes()
        assert expected.tobytes() == flux.edit("x", RGB, seed=np.int64(1), width=80.0).tobytes()
        assert flux.img2img("x", file, seed=1).size == (80, 64)
        flux.encode_prompts("a cat")
        for call in (
            lambda: flux.img2img("x", None),
            lambda: flux.edit("x", None),
            lambda: flux.generate("x", seed="1"),
            lambda: flux.generate("x", seed=True),
            lambda: flux.generate("x", seed=10**5000),
            lambda: flux.generate("x", callback=5),
            lambda: flux.run(Request(prompt="x"), 5),
            lambda: flux.run("x", [5]),
            lambda: flux.steps("x", 5),
            lambda: flux.check(None),
            lambda: flux.encode_prompts([5]),
            lambda: flux.encode_prompts(["a"], 3),
        ):
            with pytest.raises(UsageError):
                call()
