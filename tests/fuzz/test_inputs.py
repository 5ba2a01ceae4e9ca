"""Damaged pictures, parameters in pictures and prompt files: success, or an error of ours."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from fluxonnx.runtime.images import load_image
from fluxonnx.runtime.metadata import embed, read_parameters, read_values
from fluxonnx.runtime.prompt_file import read_prompt_file
from tests.fuzz.support import damaged_bytes, damaged_json, fuzzed, only_our_errors

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PARAMETERS = {
    "prompt": "a cat",
    "negative_prompt": "",
    "seed": 5,
    "steps": 4,
    "width": 256,
    "height": 256,
    "guidance_scale": 1.0,
    "sigmas": [1.0, 0.5],
    "reference_files": ["a.png"],
    "reference_sha256": ["0123"],
    "image_file": "b.png",
    "tile": 384,
    "version": "1",
    "model": "m",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def picture(format: str, mode: str = "RGB") -> bytes:
    image = Image.linear_gradient("L").resize((24, 16)).convert(mode)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    options: dict = {"exif": exif} if format in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    if format in ("PNG", "JPEG", "WEBP"):
        options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("a", "b" * 50, zip=True)
        options["pnginfo"].add_itxt("fluxonnx", json.dumps(PARAMETERS), zip=True)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


SEEDS = [
    *(picture(format) for format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "ICO", "TGA")),
    *(picture("PNG", mode) for mode in ("RGBA", "LA", "P", "1", "I;16")),
    picture("JPEG", "CMYK"),
]


@fuzzed(600)
@given(content=st.sampled_from(SEEDS).flatmap(damaged_bytes))
def test_pictures(folder, content):
    path = folder / "picture"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with only_our_errors():
            assert load_image(path).mode == "RGB"
        with only_our_errors():
            read_parameters(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_parameters(folder, format):
    path = folder / f"parameters.{format.lower()}"

    @fuzzed(150)
    @given(content=damaged_json(PARAMETERS))
    def run(content):
        options = embed(format, {"prompt": "x"})
        if format == "PNG":
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_itxt("fluxonnx", content.decode("utf-8", "replace"))
        else:
            exif = Image.Exif()
            exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + content[:60_000]
            options = {"exif": exif.tobytes()}
        Image.new("RGB", (2, 2)).save(path, format, **options)
        with only_our_errors():
            read_values(path)

    run()


LINE = {"prompt": "a cat", "seed": 5, "width": 256, "output": "a.png", "guidance_scale": 1.0, "sampler": "heun"}


@fuzzed(250)
@given(lines=st.lists(damaged_json(LINE) | st.binary(max_size=30) | st.text(max_size=30).map(str.encode), max_size=3))
def test_prompt_files(folder, lines):
    path = folder / "prompts.txt"
    path.write_bytes(b"\n".join(lines))
    with only_our_errors():
        assert all(isinstance(values["prompt"], str) for values in read_prompt_file(path))


@fuzzed(100)
@given(content=damaged_bytes(b'a cat\n{"prompt": "x", "seed": 5}\r\n{red|blue}\r'))
def test_prompt_file_bytes(folder, content):
    path = folder / "prompts.txt"
    path.write_bytes(content)
    with only_our_errors():
        read_prompt_file(path)
