"""Pictures out of what was sent to a terminal, as the terminal would read it."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from PIL import Image


def kitty(data: str) -> list[Image.Image]:
    """The pictures that were sent by Kitty's protocol."""
    found: dict[str, str] = {}
    for keys, payload in re.findall(r"\x1b_G([^;\x1b]*);([^\x1b]*)\x1b\\", data):
        values = dict(item.split("=") for item in keys.split(","))
        if values.get("f") == "100":
            found[values["i"]] = found.get(values["i"], "") + payload
    return [_picture(text) for text in found.values()]


def iterm2(data: str) -> list[Image.Image]:
    """The pictures that were sent by iTerm2's protocol."""
    return [_picture(text) for text in re.findall(r"\x1b\]1337;File=[^:]*:([^\x07]*)\x07", data)]


def _picture(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image.convert("RGB")


def sixel(data: str) -> list[Image.Image]:
    """The pictures that were sent as Sixel (VT330/VT340 Programmer Reference Manual, chapter 14)."""
    return [_sixels(body) for body in re.findall(r"\x1bP[\d;]*q([^\x1b]*)\x1b\\", data)]


def _sixels(body: str) -> Image.Image:
    size = re.match(r'"\d+;\d+;(\d+);(\d+)', body)
    assert size
    width, height = int(size[1]), int(size[2])
    pixels = np.zeros((-(-height // 6) * 6, width, 3), np.uint8)
    palette: dict[int, tuple[int, ...]] = {}
    colour, column, band = 0, 0, 0
    for token in re.finditer(r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)([?-~])|([?-~])|([$-])", body[size.end() :]):
        if token[1]:
            colour = int(token[1])
            if token[2]:
                palette[colour] = tuple(round(int(part) * 255 / 100) for part in token.group(2, 3, 4))
        elif token[8]:
            column, band = 0, band + (token[8] == "-")
        else:
            count, bits = int(token[5] or 1), ord(token[6] or token[7]) - 63
            for bit in range(6):
                if bits >> bit & 1:
                    pixels[band * 6 + bit, column : column + count] = palette[colour]
            column += count
    return Image.fromarray(pixels[:height])
