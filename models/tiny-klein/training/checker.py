"""Rule-based detection of a picture's background and things, with their shapes, colours, textures and places.

The checker infers the scene whose drawing is closest to the picture, so that a generated picture can be compared with
the requested scene. Nothing here is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from scenes import COLOURS, CONTRAST, SHAPES, SIZE, SIZES, TEXTURES, Background, Scene, Thing, outline, paint
from tasks import Task

# A pixel at least this far from the background colour belongs to a thing. It is half of the contrast of scenes.py.
FOREGROUND = CONTRAST / 2
# Connected components of fewer pixels are noise, not things.
SMALLEST = 40
# Tolerance for a thing's position, in pixels. Named places are 36 pixels apart; things in a relation, 56.
PLACE = 14.0

ASPECTS = ("shape", "colour", "texture", "size", "place")


def detect_scene(picture: np.ndarray) -> Scene:
    """Infer the scene of a picture, uint8 [128, 128, 3]. Its things are sorted from left to right."""
    pixels = picture.astype(np.float32)
    plane = fit_background(pixels)
    background = name_background(plane)
    mask = np.linalg.norm(pixels - plane, axis=-1) > FOREGROUND
    things = [name_thing(part, pixels, plane, background) for part in components(mask)]
    return Scene(tuple(sorted(things, key=lambda thing: thing.x)), background)


def fit_background(pixels: np.ndarray) -> np.ndarray:
    """Fit a plane to the border of the picture, which things never reach: float32 [128, 128, 3]."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) / (SIZE - 1)
    basis = np.stack([np.ones_like(x), x, y], -1)
    edge = np.ones((SIZE, SIZE), bool)
    edge[2:-2, 2:-2] = False
    for _ in range(3):  # pixels that do not fit are excluded from the next fit
        plane = basis @ np.linalg.lstsq(basis[edge], pixels[edge], rcond=None)[0]
        fits = edge & (np.linalg.norm(pixels - plane, axis=-1) < FOREGROUND)
        if fits.sum() < 50:
            break
        edge = fits
    return plane


def name_background(plane: np.ndarray) -> Background:
    """Name the colours of a background and the direction of its gradient."""
    across = np.linalg.norm(plane[64, -1] - plane[64, 0])
    down = np.linalg.norm(plane[-1, 64] - plane[0, 64])
    if max(across, down) < FOREGROUND:
        return Background(nearest_colour(plane[64, 64]))
    ends = (plane[64, 0], plane[64, -1]) if across > down else (plane[0, 64], plane[-1, 64])
    first, second = map(nearest_colour, ends)
    return Background(first) if first == second else Background(first, second, "right" if across > down else "down")


def nearest_colour(colour: np.ndarray) -> str:
    """Return the name of the closest colour."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the connected components of a mask that are large enough to be things."""
    left = mask.copy()
    while left.any():
        part = np.zeros_like(mask)
        part[np.unravel_index(left.argmax(), mask.shape)] = True
        while True:
            grown = part.copy()
            grown[1:] |= part[:-1]
            grown[:-1] |= part[1:]
            grown[:, 1:] |= grown[:, :-1]
            grown[:, :-1] |= grown[:, 1:]
            grown &= left
            if (grown == part).all():
                break
            part = grown
        left &= ~part
        if part.sum() >= SMALLEST:
            yield part


def name_thing(mask: np.ndarray, pixels: np.ndarray, plane: np.ndarray, background: Background) -> Thing:
    """Find the shape that overlaps a mask most, then the colour and texture with the smallest pixel error."""
    shape, x, y, r = max((place_shape(mask, shape) for shape in SHAPES), key=lambda fit: overlap(mask, *fit))
    size = min(SIZES, key=lambda name: abs(r - np.mean(SIZES[name])))
    cover = outline(shape, x, y, r)
    best, smallest = Thing(shape, "black"), np.inf
    for texture in TEXTURES:
        for colour in COLOURS:
            thing = Thing(shape, colour, texture, size, x, y, r)
            drawn = plane + cover[..., None] * (paint(thing, cover, background) - plane)
            error = float(np.abs(drawn - pixels)[mask].mean())
            if error < smallest:
                best, smallest = thing, error
    return best


def place_shape(mask: np.ndarray, shape: str) -> tuple[str, float, float, float]:
    """Return the shape with the centre and radius that give it the same bounding box as a mask."""
    left, top, right, bottom = unit_bounds(shape)
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    width, height = columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
    r = (width / (right - left) + height / (bottom - top)) / 2
    x = (columns[0] + columns[-1] + 1) / 2 - r * (left + right) / 2
    y = (rows[0] + rows[-1] + 1) / 2 - r * (top + bottom) / 2
    return shape, float(x), float(y), float(r)


@cache
def unit_bounds(shape: str) -> tuple[float, float, float, float]:
    """Return the bounding box (left, top, right, bottom) of a shape of radius 1 centred at 0."""
    mask = outline(shape, 64, 64, 40) > 0.5
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    return (left - 64) / 40, (top - 64) / 40, (right - 64) / 40, (bottom - 64) / 40


def overlap(mask: np.ndarray, shape: str, x: float, y: float, r: float) -> float:
    """Return the intersection over union of a mask and a shape."""
    other = outline(shape, x, y, r) > 0.5
    return float((mask & other).sum() / max(1, (mask | other).sum()))


# Comparison with the requested scene


def match_things(wanted: Scene, found: Scene) -> list[Thing | None]:
    """Match each requested thing with the nearest detected one. Each detected thing is used at most once."""
    left = list(found.things)
    pairs: list[Thing | None] = []
    for thing in wanted.things:
        nearest = min(left, key=lambda other: np.hypot(other.x - thing.x, other.y - thing.y), default=None)
        pairs.append(nearest)
        if nearest is not None:
            left.remove(nearest)
    return pairs


def matches(aspect: str, wanted: Thing, found: Thing | None) -> bool:
    """Whether a detected thing matches the requested one in one aspect."""
    if found is None:
        return False
    if aspect == "place":
        return float(np.hypot(wanted.x - found.x, wanted.y - found.y)) < PLACE
    if aspect == "size":
        return 0.75 < found.r / wanted.r < 1.33
    return getattr(wanted, aspect) == getattr(found, aspect)


def judge(task: Task, picture: np.ndarray) -> dict[str, bool]:
    """Compare a picture with the target of a task.

    Returns:
        Whether each criterion is met: count, background, the aspects (each must be right for every thing), and all of
        these together ("all"). For edits also "change" (what the prompt changes) and "rest" (what must stay).
    """
    wanted, found = task.target, detect_scene(picture)
    pairs = list(zip(wanted.things, match_things(wanted, found), strict=True))
    results = {aspect: all(matches(aspect, *couple) for couple in pairs) for aspect in ASPECTS}
    results["count"] = len(wanted.things) == len(found.things)
    results["background"] = wanted.background == found.background
    results["all"] = all(results.values())
    if task.sources:
        changed, kept = split_aspects(task.sources[0], wanted)
        right: dict = {(i, aspect): matches(aspect, *couple) for i, couple in enumerate(pairs) for aspect in ASPECTS}
        right["count"], right["background"] = results["count"], results["background"]
        results["change"], results["rest"] = all(right[key] for key in changed), all(right[key] for key in kept)
    return results


def split_aspects(before: Scene, after: Scene) -> tuple[list, list]:
    """Split the aspects of the target into those that an edit changes and those that it keeps."""
    changed: list = []
    kept: list = []
    (changed if len(before.things) != len(after.things) else kept).append("count")
    (changed if before.background != after.background else kept).append("background")
    fewer = len(after.things) < len(before.things)
    for i, thing in enumerate(after.things):
        if fewer:  # things that remain after a removal are unchanged
            old: Thing | None = thing
        else:
            old = before.things[i] if i < len(before.things) else None
        for aspect in ASPECTS:
            same_place = old is not None and (old.x, old.y) == (thing.x, thing.y)
            is_kept = old is not None and (same_place if aspect == "place" else matches(aspect, thing, old))
            (kept if is_kept else changed).append((i, aspect))
    return changed, kept
