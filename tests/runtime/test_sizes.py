"""The size of the output follows the input picture, with its ratio, and whoever gets another one is told."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import MAX_SIDE, MIN_SIDE
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
    if max(size) > MAX_SIDE:
        assert told == [
            f"the picture to paint over is {size[0]}x{size[1]}, more than can be drawn: "
            f"the result is {found.width}x{found.height}"
        ]
    else:
        assert told == []


@pytest.mark.parametrize(
    ("size", "expected", "offered"),
    [
        ((1024, 1024), (1024, 1024), None),
        ((1000, 700), (992, 688), None),
        ((1920, 1080), (1360, 768), (1792, 1008)),
        ((1600, 1200), (1168, 880), (1600, 1200)),
        ((4032, 3024), (1168, 880), (1792, 1344)),
        ((2048, 512), (1792, 448), None),
        ((4000, 600), (1792, 272), None),
    ],
)
def test_edited(size, expected, offered):
    """References are capped at 1 megapixel: the warning names both sizes, and the flags for the photo's own."""
    found, told = resolved(references=(photo(size), photo((64, 64))))
    assert (found.width, found.height) == expected
    if offered:
        (text,) = told
        assert f"{size[0]}x{size[1]}" in text
        assert f"the result is {expected[0]}x{expected[1]}" in text
        assert tuple(map(int, FLAGS.search(text).groups())) == offered
        again, told = resolved(references=(photo(size),), width=offered[0], height=offered[1])
        assert (again.width, again.height) == offered
        assert told == []
    else:
        assert len(told) == (max(size) > MAX_SIDE)


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
    found, _ = resolved(width=512)
    assert (found.width, found.height) == (512, 256)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": photo((50, 64))}, "width 48 can't be drawn: the picture is 50x64"),
        ({"image": photo((300, 20))}, "height 16 can't be drawn"),
        ({"image": photo((3000, 400)), "height": 512}, "height 512 can't be drawn with the ratio .* 3840x512"),
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
