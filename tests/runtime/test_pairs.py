"""Every mode together with every other one: each still does what it does alone."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.runtime.request import Request, resolve
from tests.support import Case

pytestmark = pytest.mark.slow

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8))
OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 80, 3), np.uint8))
MASK = Image.new("L", PHOTO.size)
MASK.paste(255, (20, 20, 60, 50))

MODES: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 2.5, "negative_prompt": "b"},
    "strength": {"image": PHOTO, "strength": 0.5},
    "references": {"references": (OTHER,), "reference_area": 0.0625},
    "mask": {"image": PHOTO, "mask": MASK},
    "crop": {"image": PHOTO, "mask": MASK, "mask_crop": 8, "width": 80, "height": 64},
    "expand": {"image": PHOTO, "expand": (16, 0, 0, 16)},
    "cache": {"step_cache": 2, "steps": 5},
}
PAIRS = [*combinations(MODES, 2)]


def request(*names: str) -> Request:
    values = {"guidance_scale": 1.0, "steps": 3}
    for name in names:
        values |= MODES[name]
    return Request(prompt="a", max_sequence_length=16, **values)


@pytest.fixture(scope="module")
def flux(checkpoints):
    with fluxonnx.load(checkpoints.exported(Case("odd-heads", is_distilled=False))) as flux:
        yield flux


@pytest.fixture(scope="module")
def alone(flux):
    """alone(name) -> the picture of a mode without others."""
    return cache(lambda name: flux.run(request(name), [5])[0].tobytes())


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(flux, alone, pair):
    wanted = request(*pair)
    *_, last = flux.steps(wanted, 5)
    image = last.image()
    seen = np.asarray(image)
    for one, another in (pair, pair[::-1]):
        if MODES[another].keys() - MODES[one].keys() - {"image"}:
            assert image.tobytes() != alone(one)
    # Its parameters make it again.
    known = {name: image.info[name] for name in Request.__dataclass_fields__ if name in image.info}
    pictures = {name: getattr(wanted, name) for name in ("image", "mask", "references")}
    again = resolve(Request(**known, **pictures), False, 16)
    assert again.parameters() == {name: image.info[name] for name in again.parameters()}
    # Outside of a mask every pixel is kept.
    if wanted.mask is not None and wanted.expand is None:
        outside = np.asarray(MASK) == 0
        assert np.array_equal(seen[outside], np.asarray(PHOTO)[outside])
    if wanted.expand is not None and wanted.mask is None:
        assert np.array_equal(seen[: PHOTO.height, 16:], np.asarray(PHOTO))
