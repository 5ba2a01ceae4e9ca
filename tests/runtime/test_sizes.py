"""The size of the output follows the input picture, with its ratio, and whoever gets another one is told."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import FITTED_SIDE, MAX_AREA, MAX_SIDE, MIN_SIDE
from fluxonnx.runtime.request import Request, ResolvedRequest, resolve

FLAGS = re.compile(r"-W (\d+) -H (\d+)")


def resolved(**values) -> tuple[ResolvedRequest, list[str]]:
    """A resolved request, and its warnings."""
    told: list[str] = []
    return resolve(Request(prompt="a", **values), True, 16, warn=told.append), told


def photo(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, "red")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1792, 1792), None),
        ((1600, 1200), None),
        ((100, 70), (96, 64)),
        ((1920, 1080), (1792, 1008)),
        ((4032, 3024), (1792, 1344)),
        ((3024, 4032), (1344, 1792)),
        ((8000, 6000), (1792, 1344)),
        ((10000, 400), (1792, 64)),
    ],
)
def test_painted_over(size, expected):
    """However large: only what can't be drawn is scaled, and that is told."""
    found, told = resolved(image=photo(size), strength=0.5)
    assert (found.width, found.height) == (expected or size)
    if max(size) > FITTED_SIDE:
        (text,) = told
        assert f"the picture to paint over is {size[0]}x{size[1]}, more than is drawn unless asked for" in text
        assert f"the result is {found.width}x{found.height}" in text
        assert "(--size input)" in text
    else:
        assert told == []


@pytest.mark.parametrize(
    ("size", "expected", "offered"),
    [
        ((1024, 1024), (1024, 1024), None),
        ((1000, 700), (992, 688), None),
        ((1920, 1080), (1360, 768), (1920, 1072)),
        ((1600, 1200), (1168, 880), (1600, 1200)),
        ((4032, 3024), (1168, 880), (2352, 1760)),
        ((2048, 512), (1792, 448), (2048, 512)),
        ((4000, 600), (1792, 272), (4000, 592)),
    ],
)
def test_edited(size, expected, offered):
    """References are capped at 1 megapixel: the warning names both sizes, and the flag for the photo's own."""
    found, told = resolved(references=(photo(size), photo((64, 64))))
    assert (found.width, found.height) == expected
    if offered:
        (text,) = told
        assert f"{size[0]}x{size[1]}" in text
        assert f"the result is {expected[0]}x{expected[1]}" in text
        assert f"(--size input), which is {offered[0]}x{offered[1]}" in text
        again, told = resolved(references=(photo(size),), size="input")
        assert (again.width, again.height) == offered
        assert again.width * again.height <= MAX_AREA
        assert any("more than can be drawn" in text for text in told) == (size == (4032, 3024))
    else:
        assert told == []


@pytest.mark.parametrize("place", ["image", "references"])
@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [
        ((1920, 1080), {"width": 960}, (960, 544)),
        ((1080, 1920), {"height": 960}, (544, 960)),
        ((4032, 3024), {"width": 1024}, (1024, 768)),
        ((100, 100), {"height": 512}, (512, 512)),
    ],
)
def test_one_side_keeps_the_ratio(place, size, given, expected):
    value = photo(size) if place == "image" else (photo(size),)
    found, told = resolved(**{place: value}, **given)
    assert (found.width, found.height) == expected
    assert told == []


def test_one_side_without_a_picture():
    """It keeps the ratio of the default size."""
    found, _ = resolved(width=512)
    assert (found.width, found.height) == (512, 512)
    defaults = {"width": 256, "height": 128, "max_sequence_length": 64}
    resized = resolve(Request(prompt="a", height=512), True, 16, defaults)
    assert (resized.width, resized.height) == (1024, 512)


@pytest.mark.parametrize(
    ("size", "offered"),
    [
        ((1000, 700), (1008, 704)),
        ((1920, 1080), (1936, 1088)),
        ((1080, 1920), (1088, 1936)),
        ((4096, 4096), (2048, 2048)),
        ((8000, 6000), (2352, 1760)),
        ((10, 10), (64, 64)),
        ((60, 6000), None),
    ],
)
def test_the_nearest_size_with_the_ratio_is_offered(size, offered):
    with pytest.raises(
        UsageError, match=f"^{size[0]}x{size[1]} can't be drawn: sides must be multiples of 16"
    ) as found:
        resolved(width=size[0], height=size[1])
    flags = FLAGS.search(str(found.value))
    assert (tuple(map(int, flags.groups())) if flags else None) == offered
    if offered:
        again, _ = resolved(width=offered[0], height=offered[1])
        assert (again.width, again.height) == offered


@pytest.mark.parametrize(
    ("size", "warned"), [((1024, 1024), 0), ((2048, 1024), 0), ((2048, 1040), 1), ((4096, 1024), 1)]
)
def test_a_warning_above_what_is_recommended(size, warned):
    found, told = resolved(width=size[0], height=size[1])
    assert (found.width, found.height) == size
    assert len([text for text in told if "above 2 megapixels" in text]) == len(told) == warned


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "input"}, "size input is the size of the input picture, but there is none"),
        ({"size": "input", "image": photo((64, 64)), "width": 64}, "leave it out, or width and height"),
        ({"size": "huge"}, "size 'huge' is unknown: choose one of input"),
        ({"width": 2048, "noise": "size-independent"}, "is made for sides of at most 1792"),
        ({"reference_area": 5}, "reference_area is 5, but must be from 0.0625 to 4"),
    ],
)
def test_impossible_sizes(values, message):
    with pytest.raises(UsageError, match=message):
        resolved(**values)


@pytest.mark.parametrize(
    ("area", "expected"), [(1, (1168, 880)), (4, (2000, 1488)), (0.25, (576, 432)), (3.9, (2000, 1488))]
)
def test_the_area_of_references(area, expected):
    found, _ = resolved(references=(photo((2000, 1500)),), reference_area=area)
    assert found.references[0].size == expected


def test_the_size_of_the_input_of_a_photo_that_is_painted_over():
    found, told = resolved(image=photo((1930, 1090)), strength=0.5, size="input")
    assert (found.width, found.height, told) == (1920, 1088, [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": photo((50, 64))}, "width 48 can't be drawn: the picture is 50x64"),
        ({"image": photo((300, 20))}, "height 16 can't be drawn"),
        ({"image": photo((3000, 400)), "height": 1024}, "height 1024 can't be drawn with the ratio .* 7680x1024"),
        ({"references": (photo((600, 100)),), "width": 256}, "width 256 can't be drawn with the ratio .* 256x48"),
    ],
)
def test_the_size_that_is_offered_works_and_distorts_nothing(values, message):
    with pytest.raises(UsageError, match=message) as found:
        resolved(**values)
    width, height = map(int, FLAGS.search(str(found.value)).groups())
    picture = values.get("image") or values["references"][0]
    assert min(width, height) >= MIN_SIDE
    assert max(width, height) <= MAX_SIDE
    assert abs(width - height * picture.width / picture.height) < 16 * max(1, picture.width / picture.height)
    again, _ = resolved(**values | {"width": width, "height": height})
    assert (again.width, again.height) == (width, height)


@pytest.mark.parametrize("size", [(5000, 50), (20, 900)])
def test_too_narrow_for_any_size(size):
    with pytest.raises(UsageError, match=r"can't be drawn: .*; crop it, or give both width and height"):
        resolved(image=photo(size))


@pytest.mark.parametrize("size", [(130, 77), (3024, 4032), (5, 3)])
def test_strength_0_at_the_pictures_own_size(size):
    """As --from says it, which makes such a picture again."""
    found, told = resolved(image=photo(size), strength=0, width=size[0], height=size[1])
    assert (found.width, found.height) == size
    assert told == []
    with pytest.raises(UsageError, match="can't be drawn"):
        resolved(image=photo(size), strength=0, width=size[0] + 1, height=size[1])
