"""Pictures of any kind come in as a person sees them, and go out with what made them."""

from __future__ import annotations

import errno
import io
import json
import re
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from fluxonnx.errors import FluxonnxError, ImageError, UsageError
from fluxonnx.runtime.images import (
    as_rgb,
    fill,
    fit_reference,
    image_to_sample,
    load_image,
    sample_to_image,
)
from fluxonnx.runtime.metadata import read_parameters
from fluxonnx.runtime.saving import check_output_path, save_image

PARAMETERS = {
    "prompt": 'a "cat" ☂\nand a dog 🐕',
    "seed": 42,
    "steps": 4,
    "width": 8,
    "height": 8,
    "model": "m",
    "version": "1",
}


def halves(left: tuple, right: tuple, mode: str = "RGB", size: tuple[int, int] = (8, 4)) -> Image.Image:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def test_exif_orientation_is_applied(tmp_path):
    """A phone held upright saves a lying picture and a note to turn it."""
    image = halves((255, 0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it
    image.save(tmp_path / "a.png", exif=exif)
    found = load_image(tmp_path / "a.png")
    assert found.size == (4, 8)
    assert found.getpixel((0, 0)) == (255, 0, 0)
    assert found.getpixel((0, 7)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("mode", "clear", "solid"),
    [("RGBA", (10, 20, 30, 0), (10, 20, 30, 255)), ("LA", (20, 0), (20, 255)), ("RGBA", (0, 0, 0, 0), (1, 2, 3, 255))],
)
def test_transparency_is_white(tmp_path, mode, clear, solid):
    halves(clear, solid, mode).save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.png")
    assert found.mode == "RGB"
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((7, 0)) == (tuple(solid[:3]) if mode == "RGBA" else (20, 20, 20))


def test_transparent_palette(tmp_path):
    image = halves((255, 0, 0), (0, 255, 0)).quantize(2)
    index = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=index)
    found = load_image(tmp_path / "a.png")
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((7, 0)) == (0, 255, 0)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.png")
    assert np.asarray(found)[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_dark_sixteen_bits_stay_dark(tmp_path):
    """A 16-bit file whose values all fit in 8 bits is nearly black, not an 8-bit picture."""
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (1, 1, 1)


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = load_image(tmp_path / "a.jpg").getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode):
    assert (
        as_rgb(
            Image.new("RGB", (4, 4), (200, 200, 200)).convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4))
        ).mode
        == "RGB"
    )


def test_colour_profile_is_converted():
    """An sRGB profile changes nothing, a damaged one is ignored, a real one moves colours."""
    image = halves((200, 30, 30), (30, 30, 200))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(np.asarray(as_rgb(image), int) - np.asarray(image, int)).max() <= 1
    image.info["icc_profile"] = b"damaged"
    assert np.array_equal(np.asarray(as_rgb(image)), np.asarray(image))


def test_animation_gives_its_first_frame_and_a_warning(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="animated: only its first frame"):
        assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_unreadable_files(tmp_path, monkeypatch):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:800])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("cut.png", "damaged"),
        ("text.png", "not an image"),
        ("absent.png", "does not exist"),
        ("folder.png", "is a folder"),
    ):
        with pytest.raises(ImageError, match=message) as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / "big.png").write_bytes(whole.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(tmp_path / "big.png")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (64, 64)),
        ((100, 77), (96, 64)),
        ((1024, 1024), (1024, 1024)),
        ((2048, 1024), (1440, 720)),
        ((512, 64), (512, 64)),
    ],
)
def test_reference_sizes(size, expected):
    assert fit_reference(Image.new("RGB", size)).size == expected


@pytest.mark.parametrize(("size", "message"), [((63, 200), "at least 64"), ((64, 513), "8 times")])
def test_reference_limits(size, message):
    with pytest.raises(UsageError, match=message):
        fit_reference(Image.new("RGB", size))


def test_fill_covers_and_crops():
    found = fill(halves((255, 0, 0), (0, 0, 255), size=(200, 100)), 64, 64)
    assert found.size == (64, 64)
    assert found.getpixel((2, 30)) == (255, 0, 0)
    assert found.getpixel((61, 30)) == (0, 0, 255)


def test_samples_round_trip():
    values = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    sample = image_to_sample(Image.fromarray(values))
    assert (sample.shape, sample.dtype) == ((1, 3, 16, 32), np.float32)
    assert sample.min() >= -1
    assert sample.max() <= 1
    assert np.array_equal(np.asarray(sample_to_image(sample[0])), values)
    assert np.asarray(sample_to_image(np.full((3, 2, 2), 7, np.float32))).min() == 255


def test_nan_is_an_error():
    with pytest.raises(FluxonnxError, match="NaN"):
        sample_to_image(np.full((3, 2, 2), np.nan, np.float32))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_parameters_survive(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_image(Image.new("RGB", (8, 8)), path, PARAMETERS)
    assert read_parameters(path) == PARAMETERS
    first = path.read_bytes()
    save_image(Image.new("RGB", (8, 8)), path, PARAMETERS)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_png_text_is_readable_by_others(tmp_path):
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", PARAMETERS)
    with Image.open(tmp_path / "a.png") as image:
        assert json.loads(image.text["fluxonnx"]) == PARAMETERS
        assert image.text["parameters"].endswith("Steps: 4, Seed: 42, Size: 8x8, Model: m, Version: fluxonnx 1")
        assert image.text["Software"] == "fluxonnx 1"


# What AUTOMATIC1111's web UI reads the last line with (re_param, modules/infotext_utils.py).
A1111_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def test_parameters_in_the_form_of_a1111(tmp_path):
    parameters = {
        "prompt": "a cat\non a mat",
        "negative_prompt": "rain, snow",
        "steps": 4,
        "seed": 42,
        "width": 64,
        "height": 96,
        "sampler": "dpmpp-2m",
        "schedule": "flow",
        "guidance_scale": 3.5,
        "strength": 0.7,
        "model": 'my, "model"',
        "version": "1",
    }
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", parameters)
    with Image.open(tmp_path / "a.png") as image:
        *prompt, negative, last = image.text["parameters"].split("\n")
    assert (prompt, negative) == (["a cat", "on a mat"], "Negative prompt: rain, snow")
    assert {key: json.loads(value) if value[0] == '"' else value for key, value in A1111_PAIR.findall(last)} == {
        "Steps": "4",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Simple",
        "CFG scale": "3.5",
        "Seed": "42",
        "Size": "64x96",
        "Model": 'my, "model"',
        "Denoising strength": "0.7",
        "Version": "fluxonnx 1",
    }


@pytest.mark.parametrize("name", ["a.ppm", "b.png"])
def test_pictures_without_parameters(tmp_path, name):
    save_image(Image.new("RGB", (8, 8)), tmp_path / name, PARAMETERS if name == "a.ppm" else None)
    with pytest.raises(ImageError, match="no fluxonnx parameters"):
        read_parameters(tmp_path / name)


def test_foreign_and_broken_metadata(tmp_path):
    for text in ("not json", "[1]", '{"seed": 1}'):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("fluxonnx", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
        with pytest.raises(ImageError):
            read_parameters(tmp_path / "a.png")


def test_webp_is_lossless(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    save_image(Image.fromarray(values), tmp_path / "a.webp")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.webp")), values)


@pytest.mark.parametrize(
    ("name", "message"), [("a.gif", "must end in"), ("no/a.png", "does not exist"), ("folder.png", "is a folder")]
)
def test_impossible_outputs(tmp_path, name, message):
    (tmp_path / "folder.png").mkdir()
    for function in (check_output_path, lambda path: save_image(Image.new("RGB", (8, 8)), path)):
        with pytest.raises(UsageError, match=message):
            function(tmp_path / name)


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "no permission")])
def test_failed_write_keeps_the_old_picture(tmp_path, monkeypatch, code, message):
    path = tmp_path / "a.png"
    save_image(Image.new("RGB", (8, 8)), path, PARAMETERS)
    before = path.read_bytes()

    def fail(self, target, **options):
        target.write(b"half")
        raise OSError(code, "synthetic")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(ImageError, match=message):
        save_image(Image.new("RGB", (8, 8), "red"), path, PARAMETERS)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_loading_warns_of_nothing_else(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(tmp_path / "a.png")


def test_pages_of_a_tiff_are_reported(tmp_path):
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match="several pages: only the first"):
        assert load_image(tmp_path / "a.tiff").getpixel((0, 0)) == (255, 0, 0)


def test_preview_in_a_phones_file_is_not_reported(tmp_path):
    """An MPO is a JPEG with a preview or a depth map behind it."""
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "gray")]
    pictures[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=pictures[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "a.jpg").getpixel((4, 4))[0] > 240


def test_one_transparent_gray_in_sixteen_bits(tmp_path):
    Image.fromarray(np.array([[0, 300, 65535]], np.uint16)).save(tmp_path / "a.png", transparency=300)
    assert np.asarray(load_image(tmp_path / "a.png"))[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]


def test_whatever_pillow_raises_is_one_line(tmp_path, monkeypatch):
    """Its readers let struct.error and the like through."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def fail(image):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(ImageError, match="seems damaged: two lines"):
        load_image(tmp_path / "a.png")


def test_parameters_too_long_for_a_jpeg_cost_a_warning_only(tmp_path):
    with pytest.warns(UserWarning, match="too long for a JPEG"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", {**PARAMETERS, "prompt": "x" * 70_000})
    assert load_image(tmp_path / "a.jpg").size == (8, 8)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_exif_has_the_form_of_a1111_too(tmp_path, suffix):
    """As read_info_from_image of its modules/images.py reads it: piexif's UserComment, whose prefix has eight bytes."""
    path = tmp_path / f"a.{suffix}"
    save_image(Image.new("RGB", (8, 8)), path, {**PARAMETERS, "prompt": "ein Schloß ☂"})
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    text = comment[8:].decode("utf-16-be")
    assert text.startswith("ein Schloß ☂\n")
    assert ("Steps: " in text) == ("steps" in PARAMETERS)
    assert read_parameters(path)["prompt"] == "ein Schloß ☂"


def test_a_long_prompt_in_a_jpeg_leaves_out_the_form_of_others(tmp_path):
    parameters = {**PARAMETERS, "prompt": "x" * 30_000}
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", parameters)
    assert read_parameters(tmp_path / "a.jpg") == parameters


def test_pictures_of_older_versions(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + json.dumps(PARAMETERS).encode()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_parameters(tmp_path / "a.jpg") == PARAMETERS


def test_file_names_that_are_not_text(tmp_path):
    """A byte that is no UTF-8 in the name of an input must not cost the picture."""
    parameters = {**PARAMETERS, "image_file": "photo\udcff.png"}
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", parameters)
    assert read_parameters(tmp_path / "a.png") == parameters


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_comment_rewritten_by_another_program(tmp_path, encoding):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + json.dumps(PARAMETERS).encode(encoding)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_parameters(tmp_path / "a.jpg") == PARAMETERS


def test_picture_too_large_for_its_format(tmp_path):
    with pytest.raises(ImageError, match="can't write"):
        save_image(Image.new("RGB", (16384, 1)), tmp_path / "a.webp")
    assert list(tmp_path.iterdir()) == []
