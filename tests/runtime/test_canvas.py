"""Inpainting: which tokens a mask selects, what is put back, and that all else keeps its pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime.canvas import expanded, fit_mask, lay_out, neighbourhood
from fluxonnx.runtime.inputs import gray_mask
from fluxonnx.runtime.request import Request, ResolvedRequest, resolve

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8))
DRAWN = Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 128, 3), np.uint8))


def white(left: int, top: int, right: int, bottom: int, size: tuple[int, int] = PHOTO.size) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (left, top, right, bottom))
    return mask


def canvas(mask: Image.Image, size: tuple[int, int] = PHOTO.size, image: Image.Image = PHOTO, **options):
    return lay_out(image, mask, size, 16, **{"blur": 0, "crop": None, "keep": True, **options})


def resolved(**values) -> tuple[ResolvedRequest, list[str]]:
    told: list[str] = []
    return resolve(Request(prompt="a", **values), True, 16, warn=told.append), told


# Masks


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "I", "I;16", "F"]
)
def test_masks_of_any_mode(mode):
    mask = white(16, 16, 64, 48)
    if mode == "PA":
        made = mask.convert("P").convert("PA")
    elif mode == "I;16":
        made = Image.fromarray(np.asarray(mask, np.uint16) * 257)
    elif mode == "F":
        made = Image.fromarray(np.asarray(mask, np.float32) / 255)
    elif mode in ("La", "RGBa"):
        made = mask.convert(f"{mode[:-1]}A").convert(mode)
    else:
        made = mask.convert(mode)
    assert made.mode == mode
    found = fit_mask(gray_mask(made), PHOTO.size, pytest.fail)
    assert np.array_equal(np.asarray(found), np.asarray(mask))


def test_transparent_parts_are_not_repainted():
    strokes = Image.new("RGBA", PHOTO.size, (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (16, 16, 64, 48))
    assert np.array_equal(np.asarray(gray_mask(strokes)), np.asarray(white(16, 16, 64, 48)))


def test_masks_of_numpy():
    values = np.zeros((96, 128), bool)
    values[16:48, 16:64] = True
    assert np.array_equal(np.asarray(gray_mask(values)), np.asarray(white(16, 16, 64, 48)))
    with pytest.raises(UsageError, match="expected uint8"):
        gray_mask(values.astype(np.float32))


def test_a_mask_is_black_or_white():
    mask = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert sorted(fit_mask(mask, (16, 16), pytest.fail).getcolors()) == [(128, 0), (128, 255)]


@pytest.mark.parametrize(("size", "distorts"), [((64, 48), False), ((256, 192), False), ((96, 96), True)])
def test_a_mask_of_another_size_is_resized_with_a_word(size, distorts):
    found, told = resolved(image=PHOTO, mask=white(0, 0, size[0] // 2, size[1], size))
    (text,) = told
    assert f"the mask is {size[0]}x{size[1]} and the picture 128x96: the mask is resized" in text
    assert ("distorts" in text) == distorts
    assert found.canvas.mask.getbbox() == (0, 0, 64, 96)


# Tokens


def test_thin_masks_are_not_missed():
    """The reference looks at the four middle pixels of each token, which a thin line may miss."""
    line = canvas(white(0, 33, 128, 36)).area(16).reshape(6, 8)
    assert np.array_equal(line[2], np.ones(8))
    assert line.sum() == 8
    thick = canvas(white(20, 20, 90, 70)).area(16).reshape(6, 8)
    assert set(thick.ravel()) <= {0, 0.25, 0.5, 1}


def test_tokens_of_a_crop_are_those_of_the_scaled_mask():
    """The box of 32x24 around the mask is drawn at 128x96."""
    found = canvas(white(40, 36, 72, 60), crop=0)
    assert found.box == (40, 36, 72, 60)
    assert found.start().size == (128, 96)
    assert found.area(16).all()


# Pixels


@pytest.mark.parametrize("crop", [None, 0, 12])
@pytest.mark.parametrize("blur", [0, 5])
def test_outside_every_pixel_is_kept(crop, blur):
    mask = white(30, 20, 77, 61)
    found = canvas(mask, crop=crop, blur=blur)
    pixels = np.asarray(found.finish(DRAWN))
    outside = np.asarray(found.mask) == 0
    assert outside.sum() > outside.size / 3
    assert np.array_equal(pixels[outside], np.asarray(PHOTO)[outside])
    inside = np.asarray(mask) == 255
    assert (pixels[inside] != np.asarray(PHOTO)[inside]).any(-1).mean() > 0.9
    if crop is None and not blur:
        assert np.array_equal(pixels[inside], np.asarray(DRAWN)[inside])


def test_without_keeping_all_of_the_box_is_the_drawn_picture():
    assert canvas(white(30, 20, 77, 61), keep=False).finish(DRAWN).tobytes() == DRAWN.tobytes()
    cropped = canvas(white(40, 36, 72, 60), keep=False, crop=0).finish(DRAWN)
    assert cropped.crop((40, 36, 72, 60)).tobytes() == DRAWN.resize((32, 24), Image.Resampling.LANCZOS).tobytes()
    assert cropped.crop((0, 0, 40, 96)).tobytes() == PHOTO.crop((0, 0, 40, 96)).tobytes()


def test_a_cropped_photo_of_any_size_keeps_its_size():
    photo = Image.new("RGB", (3001, 2003), "red")
    found, _ = resolved(image=photo, mask=white(2900, 1900, 3001, 2003, photo.size), mask_crop=16)
    assert found.canvas.finish(Image.new("RGB", (found.width, found.height))).size == photo.size
    left, top, right, bottom = found.canvas.box
    assert (right, bottom) == photo.size
    assert (right - left) / (bottom - top) == pytest.approx(found.width / found.height, rel=0.02)


@pytest.mark.parametrize("pad", [0, 7, 500])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (127, 95, 128, 96), (0, 40, 128, 44), (60, 0, 64, 96), (0, 0, 128, 96)])
def test_neighbourhoods_stay_inside(box, pad):
    left, top, right, bottom = neighbourhood(white(*box), (128, 96), pad)
    assert 0 <= left <= box[0] < box[2] <= right <= 128
    assert 0 <= top <= box[1] < box[3] <= bottom <= 96


# Borders


def test_borders_are_drawn_and_the_rest_is_kept():
    image, mask = expanded(PHOTO, None, (16, 0, 32, 48))
    assert image.size == mask.size == (176, 144)
    assert image.crop((16, 0, 144, 96)).tobytes() == PHOTO.tobytes()
    assert mask.crop((16, 0, 144, 96)).getextrema() == (0, 0)
    assert (np.asarray(mask) == 255).sum() == 176 * 144 - 128 * 96
    _, both = expanded(PHOTO, white(0, 0, 16, 16), (16, 0, 32, 48))
    assert (np.asarray(both) == 255).sum() == 176 * 144 - 128 * 96 + 256


def test_the_size_counts_the_borders():
    found, told = resolved(image=PHOTO, expand=(16, 16, 48, 0))
    assert (found.width, found.height, told) == (192, 112, [])
    assert found.strength == 1


# Bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": PHOTO, "mask": Image.new("L", PHOTO.size)}, "the mask has no white part"),
        ({"mask": white(0, 0, 9, 9)}, "the mask says which part of a picture is drawn, but there is none"),
        ({"expand": (16, 0, 0, 0)}, "expand says which part of a picture is drawn, but there is none"),
        ({"image": PHOTO, "mask_blur": 2}, "mask_blur says how a mask is used, but there is none"),
        ({"image": PHOTO, "mask_crop": 2}, "mask_crop says how a mask is used, but there is none"),
        ({"image": PHOTO, "keep_unmasked": False}, "keep_unmasked says how a mask is used"),
        ({"image": PHOTO, "expand": (1, 2, 3)}, "expand is 1,2,3, but must be left,top,right,bottom"),
        ({"image": PHOTO, "expand": (1, 2, 3, -1)}, "each from 0 to 4096"),
        ({"image": PHOTO, "expand": (0, 0, 0, 0)}, "adds nothing"),
        ({"image": PHOTO, "expand": (16, 0, 0, 0), "strength": 0}, "strength 0 draws nothing"),
        ({"image": PHOTO, "mask": "absent.png"}, "absent.png does not exist"),
        ({"image": PHOTO, "mask": 7}, "a picture is of type int"),
    ],
)
def test_impossible_masks(values, message):
    with pytest.raises(FluxonnxError, match=message):
        resolved(**values)
