"""What is in a picture: finds background, things, their shapes, colours, textures and places, by rules.

It explains a picture by the scene that would be drawn like it, so that a generated picture can be compared with the
scene that was asked for. Nothing here is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from scenes import COLOURS, CONTRAST, SHAPES, SIZE, SIZES, TEXTURES, Background, Scene, Thing, outline, paint
from tasks import Task

# A pixel this far from the background belongs to a thing; half of what things have to differ by.
FOREGROUND = CONTRAST / 2
# Smaller spots are no things.
SMALLEST = 40
# How far from its place a thing may be, in pixels; the grid of places is 36 apart, relations are 56.
PLACE = 14.0

ASPECTS = ("shape", "colour", "texture", "size", "place")


def look(picture: np.ndarray) -> Scene:
    """Explain a picture, uint8 [128, 128, 3]: things from left to right."""
    pixels = picture.astype(np.float32)
    plane = fit_background(pixels)
    background = name_background(plane)
    mask = np.linalg.norm(pixels - plane, axis=-1) > FOREGROUND
    things = [name_thing(part, pixels, plane, background) for part in components(mask)]
    return Scene(tuple(sorted(things, key=lambda thing: thing.x)), background)


def fit_background(pixels: np.ndarray) -> np.ndarray:
    """Fit a plane to the edge of the picture, which things do not touch: float32 [128, 128, 3]."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) / (SIZE - 1)
    basis = np.stack([np.ones_like(x), x, y], -1)
    edge = np.ones((SIZE, SIZE), bool)
    edge[2:-2, 2:-2] = False
    for _ in range(3):  # what does not fit is left out the next time
        plane = basis @ np.linalg.lstsq(basis[edge], pixels[edge], rcond=None)[0]
        fits = edge & (np.linalg.norm(pixels - plane, axis=-1) < FOREGROUND)
        if fits.sum() < 50:
            break
        edge = fits
    return plane


def name_background(plane: np.ndarray) -> Background:
    """Name the colours of a background and the direction in which it changes."""
    across = np.linalg.norm(plane[64, -1] - plane[64, 0])
    down = np.linalg.norm(plane[-1, 64] - plane[0, 64])
    if max(across, down) < FOREGROUND:
        return Background(nearest_colour(plane[64, 64]))
    ends = (plane[64, 0], plane[64, -1]) if across > down else (plane[0, 64], plane[-1, 64])
    first, second = map(nearest_colour, ends)
    return Background(first) if first == second else Background(first, second, "right" if across > down else "down")


def nearest_colour(colour: np.ndarray) -> str:
    """Name a colour."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the connected parts of a mask that are large enough to be things."""
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
    """Find the shape that covers a mask best, then the colour and texture that explain its pixels best."""
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
    """Return where a shape would have to be, and how large, to have the same bounds as a mask."""
    left, top, right, bottom = unit_bounds(shape)
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    width, height = columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
    r = (width / (right - left) + height / (bottom - top)) / 2
    x = (columns[0] + columns[-1] + 1) / 2 - r * (left + right) / 2
    y = (rows[0] + rows[-1] + 1) / 2 - r * (top + bottom) / 2
    return shape, float(x), float(y), float(r)


@cache
def unit_bounds(shape: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a shape of radius 1 at 0."""
    mask = outline(shape, 64, 64, 40) > 0.5
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    return (left - 64) / 40, (top - 64) / 40, (right - 64) / 40, (bottom - 64) / 40


def overlap(mask: np.ndarray, shape: str, x: float, y: float, r: float) -> float:
    """Intersection over union with a shape."""
    other = outline(shape, x, y, r) > 0.5
    return float((mask & other).sum() / max(1, (mask | other).sum()))


# Comparing


def pair(wanted: Scene, found: Scene) -> list[Thing | None]:
    """Return, for each thing that is wanted, the one that was found nearest to it; each is used once."""
    left = list(found.things)
    pairs: list[Thing | None] = []
    for thing in wanted.things:
        nearest = min(left, key=lambda other: np.hypot(other.x - thing.x, other.y - thing.y), default=None)
        pairs.append(nearest)
        if nearest is not None:
            left.remove(nearest)
    return pairs


def same(aspect: str, wanted: Thing, found: Thing | None) -> bool:
    """Whether a thing is as it should be, in one respect."""
    if found is None:
        return False
    if aspect == "place":
        return float(np.hypot(wanted.x - found.x, wanted.y - found.y)) < PLACE
    if aspect == "size":
        return 0.75 < found.r / wanted.r < 1.33
    return getattr(wanted, aspect) == getattr(found, aspect)


def judge(task: Task, picture: np.ndarray) -> dict[str, bool]:
    """Say what is right about a picture.

    Returns:
        count, background, shape, colour, place and all, of every thing; for edits also change and rest.
    """
    wanted, found = task.target, look(picture)
    pairs = list(zip(wanted.things, pair(wanted, found), strict=True))
    marks = {aspect: all(same(aspect, *couple) for couple in pairs) for aspect in ASPECTS}
    marks["count"] = len(wanted.things) == len(found.things)
    marks["background"] = wanted.background == found.background
    marks["all"] = all(marks.values())
    if task.sources:
        changed, kept = split_aspects(task.sources[0], wanted)
        right: dict = {(i, aspect): same(aspect, *couple) for i, couple in enumerate(pairs) for aspect in ASPECTS}
        right["count"], right["background"] = marks["count"], marks["background"]
        marks["change"], marks["rest"] = all(right[key] for key in changed), all(right[key] for key in kept)
    return marks


def split_aspects(before: Scene, after: Scene) -> tuple[list, list]:
    """Return which aspects of the target an edit changes, and which it keeps."""
    changed: list = []
    kept: list = []
    (changed if len(before.things) != len(after.things) else kept).append("count")
    (changed if before.background != after.background else kept).append("background")
    fewer = len(after.things) < len(before.things)
    for i, thing in enumerate(after.things):
        if fewer:  # those that are left are as they were
            old: Thing | None = thing
        else:
            old = before.things[i] if i < len(before.things) else None
        for aspect in ASPECTS:
            same_place = old is not None and (old.x, old.y) == (thing.x, thing.y)
            is_kept = old is not None and (same_place if aspect == "place" else same(aspect, thing, old))
            (kept if is_kept else changed).append((i, aspect))
    return changed, kept
