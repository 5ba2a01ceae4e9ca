"""Scenes of the bundled demo model: things on a background, and how they are drawn.

A scene is plain data, and `draw` renders it. All lengths are in pixels of a 128x128 picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 128

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 225, 60),
    "green": (50, 160, 70),
    "cyan": (70, 205, 220),
    "blue": (45, 80, 200),
    "purple": (130, 60, 170),
    "pink": (245, 150, 190),
    "brown": (125, 80, 45),
    "black": (20, 20, 20),
    "gray": (140, 140, 140),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring", "cross", "heart", "moon")
TEXTURES = ("solid", "striped", "dotted", "outlined")
SIZES = {"small": (11.5, 12.5), "medium": (18.0, 19.0), "large": (28.0, 30.0)}

# Centres of things, by the name of the place.
NEAR, MIDDLE, FAR = 28.0, 64.0, 100.0
PLACES = {
    "top left": (NEAR, NEAR),
    "top": (MIDDLE, NEAR),
    "top right": (FAR, NEAR),
    "left": (NEAR, MIDDLE),
    "center": (MIDDLE, MIDDLE),
    "right": (FAR, MIDDLE),
    "bottom left": (NEAR, FAR),
    "bottom": (MIDDLE, FAR),
    "bottom right": (FAR, FAR),
}

# A thing needs at least this distance in RGB from the background to be told from it reliably.
CONTRAST = 90.0
# The smallest radius of a thing with a texture: stripes and dots need room.
TEXTURE_RADIUS = 15.0
# Distance between stripes or dots. It is the size of a latent cell of the autoencoder, so that all cells show the same
# part of the pattern.
PERIOD = 8.0


@dataclass(frozen=True)
class Thing:
    """One object with its appearance, centre and radius."""

    shape: str
    colour: str
    texture: str = "solid"
    size: str = "medium"
    x: float = MIDDLE
    y: float = MIDDLE
    r: float = 18.5


@dataclass(frozen=True)
class Background:
    """One colour, or a gradient from the first colour (top or left) to the second."""

    colour: str
    second: str | None = None
    direction: str = "down"  # or "right"


@dataclass(frozen=True)
class Scene:
    """The content of a picture."""

    things: tuple[Thing, ...]
    background: Background

    def with_thing(self, index: int, **changes: object) -> Scene:
        """Return a copy of the scene in which one thing is changed."""
        things = list(self.things)
        things[index] = replace(things[index], **changes)  # type: ignore[arg-type]
        return replace(self, things=tuple(things))


def rgb(name: str) -> np.ndarray:
    """Return the RGB values of a colour, float32 in 0..255."""
    return np.array(COLOURS[name], np.float32)


def contrasts(colour: str, background: Background) -> bool:
    """Whether a thing of this colour stands out from every part of this background."""
    return _distance(rgb(colour), background) > CONTRAST


def _distance(colour: np.ndarray, background: Background) -> float:
    """Return the distance between a colour and the nearest colour of a background."""
    first = rgb(background.colour)
    along = rgb(background.second or background.colour) - first
    length = float(along @ along)
    nearest = float(np.clip((colour - first) @ along / length, 0, 1)) if length else 0.0
    return float(np.linalg.norm(colour - first - nearest * along))


def draw(scene: Scene) -> np.ndarray:
    """Draw a scene with anti-aliasing: uint8 [128, 128, 3]."""
    canvas = _background(scene.background)
    for thing in scene.things:
        mask = outline(thing.shape, thing.x, thing.y, thing.r)
        canvas += mask[..., None] * (paint(thing, mask, scene.background) - canvas)
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)


def _background(background: Background) -> np.ndarray:
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)
    weight = ramp[:, None, None] if background.direction == "down" else ramp[None, :, None]
    first, second = rgb(background.colour), rgb(background.second or background.colour)
    return np.broadcast_to(first + weight * (second - first), (SIZE, SIZE, 3)).copy()


def paint(thing: Thing, mask: np.ndarray, background: Background) -> np.ndarray:
    """Return the colour of each pixel of a thing, before its mask is applied: float32 [128, 128, 3] or [3].

    Stripes and dots are aligned with the picture, not with the thing, so that a latent cell shows them in the same way
    wherever the thing is.
    """
    colour = rgb(thing.colour)
    if thing.texture == "solid":
        return colour
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    if thing.texture == "striped":
        weight = np.clip(0.5 + 2 * np.sin(y * (2 * np.pi / PERIOD)), 0, 1)
    elif thing.texture == "dotted":
        near = np.hypot(x % PERIOD - PERIOD / 2, y % PERIOD - PERIOD / 2)
        weight = np.clip(0.3 * PERIOD + 0.5 - near, 0, 1)
    else:
        inner = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.MinFilter(7))
        weight = 1 - np.asarray(inner, np.float32) / 255
    return colour + weight[..., None] * (_accent(thing, background) - colour)


def _accent(thing: Thing, background: Background) -> np.ndarray:
    """Return the second colour of a texture: darker or lighter, whichever has the higher contrast."""
    colour, strength = rgb(thing.colour), 1.0 if thing.texture == "outlined" else 0.55
    accents = [colour + strength * (tone - colour) for tone in (np.float32(20), np.float32(245))]
    return max(accents, key=lambda accent: min(_distance(accent, background), float(np.linalg.norm(accent - colour))))


def outline(shape: str, x: float, y: float, r: float) -> np.ndarray:
    """Return the coverage of each pixel by a shape: float32 [128, 128] in 0..1."""
    scale = 4
    image = Image.new("L", (SIZE * scale, SIZE * scale))
    pen = ImageDraw.Draw(image)

    def disc(cx: float, cy: float, radius: float, fill: int) -> None:
        corners = [(cx - radius) * scale, (cy - radius) * scale, (cx + radius) * scale, (cy + radius) * scale]
        pen.ellipse(corners, fill=fill)

    if shape in ("circle", "ring", "moon"):
        disc(x, y, r, 255)
        if shape == "ring":
            disc(x, y, 0.5 * r, 0)
        elif shape == "moon":
            disc(x + 0.45 * r, y - 0.1 * r, 0.8 * r, 0)
    else:
        pen.polygon([((x + r * px) * scale, (y + r * py) * scale) for px, py in _CORNERS[shape]], fill=255)
    return np.asarray(image.reduce(scale), np.float32) / 255


def _star() -> list[tuple[float, float]]:
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2, 0.45, 1.08)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [(float(px / 16), float((py - 2) / 15)) for px, py in zip(x, y, strict=True)]


_ARM = 0.34
_CORNERS = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "diamond": [(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)],
    "triangle": [(0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        (sx * px, sy * py)
        for sx, sy, path in (
            (1, -1, ((_ARM, 1), (_ARM, _ARM), (1, _ARM))),
            (1, 1, ((1, _ARM), (_ARM, _ARM), (_ARM, 1))),
            (-1, 1, ((_ARM, 1), (_ARM, _ARM), (1, _ARM))),
            (-1, -1, ((1, _ARM), (_ARM, _ARM), (_ARM, 1))),
        )
        for px, py in path
    ],
}
