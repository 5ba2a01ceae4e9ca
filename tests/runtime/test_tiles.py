"""Tiles: what they cover, when they are used, and that a picture says so."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise, product

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.cli import main
from fluxonnx.errors import UsageError
from fluxonnx.runtime.memory import whole_bytes
from fluxonnx.runtime.tiles import SMALLEST, TILE, Tiling, choose_tile, in_tiles, spans
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
LARGE = {"width": TILE + 64, "height": 64, "steps": 1, "seed": 1}


@pytest.fixture
def root(checkpoints):
    return checkpoints.exported(CASE)


def test_spans_cover_a_side_evenly():
    """No span is longer than a tile or shares less than the overlap, and the weights of every result add up to 1."""
    for length, tile in product(range(25, 140), (24, 36)):
        found = spans(length, tile, 8, 2)
        total = np.zeros(2 * length)
        for start, size, weight in found:
            assert size <= tile
            total[2 * start : 2 * (start + size)] += weight
        np.testing.assert_allclose(total, 1, atol=1e-6)
        assert len({size for _, size, _ in found}) == 1
        assert found[-1][0] + found[-1][1] == length
        for (start, size, _), (following, _, _) in pairwise(found):
            assert start + size - following >= (8 if len(found) > 1 else 0)
    assert len(spans(64, 36, 8, 1)) == 2  # two tiles of 576 make 1024


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 16), (16, 1)])
def test_functions_of_single_pixels_are_exact(n_in, n_out):
    """Decoding and encoding: every result is where it belongs."""
    values = np.random.default_rng(0).standard_normal((1, 2, 30 * n_in, 65 * n_in), np.float32)

    def run(piece: np.ndarray) -> np.ndarray:
        assert max(piece.shape[2:]) <= 24 * n_in
        return piece.repeat(16, 2).repeat(16, 3) if n_out == 16 else piece[..., ::16, ::16]

    found = in_tiles(run, values, Tiling(384, 16), n_in, n_out)
    expected = values.repeat(16, 2).repeat(16, 3) if n_out == 16 else values[..., ::16, ::16]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_small_pictures_are_left_whole():
    seen = []
    values = np.zeros((1, 1, 16, 12), np.float32)
    assert in_tiles(lambda piece: seen.append(piece) or piece, values, Tiling(384, 16), 1, 1) is values
    assert in_tiles(lambda piece: seen.append(piece) or piece, values, Tiling(None, 16), 1, 1) is values
    assert all(piece is values for piece in seen)


def test_low_memory(root):
    """Larger pictures are decoded in tiles and say so; others stay bitwise what they are."""
    with fluxonnx.load(root) as plain, fluxonnx.load(root, low_memory=True) as low:
        small, large = plain.generate("a", 64, 96, 1, 1), plain.generate("a", **LARGE)
        assert low.generate("a", 64, 96, 1, 1).tobytes() == small.tobytes()
        tiled = low.generate("a", **LARGE)
        assert tiled.info["tile"] == TILE
        assert "tile" not in small.info | large.info
        assert tiled.tobytes() != large.tobytes()
        assert plain.generate("a", **LARGE, tile=TILE).tobytes() == tiled.tobytes()
        # encoding is done in tiles, too
        wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, TILE + 64, 3), np.uint8))
        oil = low.img2img("a", wide, 0.7, seed=1, steps=2)
        assert oil.info["tile"] == TILE
        assert oil.tobytes() != plain.img2img("a", wide, 0.7, seed=1, steps=2).tobytes()


NEEDED = whole_bytes(1024 * 768, 256)


@pytest.mark.parametrize(
    ("sizes", "wanted", "low_memory", "free", "expected"),
    [
        ([(TILE, TILE)], None, True, 0, None),
        ([(TILE + 16, 64)], None, True, 1 << 50, TILE),
        ([(64, TILE + 16)], None, False, 1 << 50, None),
        ([(64, 64), (1024, 768)], None, False, NEEDED, None),
        ([(512, 512)], 384, False, 1 << 50, 384),
        ([(384, 384)], 384, True, 0, None),
    ],
)
def test_when_tiles_are_used(sizes, wanted, low_memory, free, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_tile(sizes, wanted, low_memory, 256, free) == expected


def test_when_tiles_are_used_for_lack_of_memory():
    """The largest picture counts."""
    with pytest.warns(UserWarning, match=r"memory is short \(4.1 GB needed, 4.1 GB free\)"):
        assert choose_tile([(64, 64), (1024, 768)], None, False, 256, NEEDED - 1) == TILE


def test_short_memory(root, open_flux):
    """Where a picture does not fit, tiles are used, with a warning; the picture can be made again anywhere."""
    short = open_flux(root, free_memory=lambda: 1000)
    with pytest.warns(UserWarning, match="memory is short .* in tiles"):
        tiled = short.generate("a", **LARGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "tile" not in short.generate("a", 64, 64, 1, 1).info
    plenty = open_flux(root, free_memory=lambda: 1 << 40)
    assert plenty.generate("a", **LARGE, tile=tiled.info["tile"]).tobytes() == tiled.tobytes()


def test_from_makes_a_tiled_picture_again(root, tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    size = ["-W", str(LARGE["width"]), "-H", "64", "-s", "1", "-S", "1"]
    assert main(["generate", "-d", str(root), "-p", "a", *size, "--low-memory", "-o", str(first), "-q"]) == 0
    assert main(["generate", "-d", str(root), "--from", str(first), "-o", str(second), "-q"]) == 0
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert json.loads(image.text["fluxonnx"])["tile"] == TILE


@pytest.mark.parametrize("tile", [0, SMALLEST - 16, SMALLEST + 1])
def test_impossible_tiles(root, tile):
    with fluxonnx.load(root) as flux, pytest.raises(UsageError, match=f"tile is {tile}, but must be a multiple of 16"):
        flux.generate("a", 64, 64, tile=tile)
