"""The size of the output: what was asked for, else that of an input picture as far as it is sensible to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import FIELD, FITTED_SIDE, MAX_AREA, MAX_SIDE, MIN_SIDE

Size = tuple[int, int]

# "We recommend staying at or below 2MP for optimal quality and speed" (help.bfl.ai, Aspect Ratios and Output
# Dimensions).
RECOMMENDED_AREA = 2 * 1024 * 1024


def asked_size(
    width: int | None, height: int | None, multiple: int, defaults: Mapping[str, int], warn: Callable[[str], None]
) -> Size:
    """Return the size of a picture without inputs, or whose both sides are given.

    If one side is given, the other one keeps the ratio of the defaults.

    Raises:
        UsageError: It can't be drawn.
    """
    usual = (defaults["width"], defaults["height"])
    if width is None and height is None:
        return checked(usual, multiple)
    if width is None or height is None:
        return size_by_ratio(width, height, usual, multiple, warn, "the default size")
    found = checked((width, height), multiple)
    _warn_above_recommended(found, warn)
    return found


def checked(size: Size, multiple: int) -> Size:
    """Return a size if it can be drawn.

    Raises:
        UsageError: It can't be; the message offers the nearest size of about the same ratio.
    """
    if any(side % multiple for side in size) or not _fits(size):
        offer = nearest(size, multiple)
        cure = f": the nearest with this ratio is {_flags(offer)}" if offer else ""
        raise UsageError(
            f"{_text(size)} can't be drawn: sides must be multiples of {multiple} from {MIN_SIDE} to {MAX_SIDE}, and "
            f"their product at most {MAX_AREA} ({MAX_AREA // 1024**2} megapixels){cure}"
        )
    return size


def painted_size(size: Size, multiple: int, warn: Callable[[str], None]) -> Size:
    """Return the size of a picture that is painted over: its own, or a smaller one of its ratio if it is very large.

    Args:
        size: The picture's.
        multiple: Sides are multiples of this.
        warn: Told if the picture is scaled.

    Raises:
        UsageError: It is too small or too narrow.
    """
    found = largest(size, multiple)
    if max(size) > FITTED_SIDE:
        own = largest(size, multiple, MAX_SIDE)
        warn(
            f"the picture to paint over is {_text(size)}, more than is drawn unless asked for: the result is "
            f"{_text(found)}; for {_whose(size, own, multiple)}, give {_input_flags(own)}"
        )
    return found


def cropped_size(size: Size, multiple: int) -> Size:
    """Return the size at which the neighbourhood of a mask is drawn: the picture's, or 1 megapixel of its ratio.

    Source: "2. Preprocess image", diffusers pipeline_flux2_klein_inpaint.py.

    Raises:
        UsageError: The picture is too small or too narrow.
    """
    scale = min(1.0, 1024 / math.sqrt(size[0] * size[1]))
    return largest((int(size[0] * scale), int(size[1] * scale)), multiple)


def edited_size(size: Size, encoded: Size, multiple: int, warn: Callable[[str], None]) -> Size:
    """Return the size of a picture that is drawn while looking at another.

    Args:
        size: Of the picture that is looked at.
        encoded: The size that it is scaled to, for the model to look at.
        multiple: Sides are multiples of this.
        warn: Told if the result is smaller than the picture.

    Raises:
        UsageError: It is too small or too narrow.
    """
    own = largest(size, multiple, MAX_SIDE)
    found = largest(encoded if max(encoded) <= FITTED_SIDE else size, multiple)
    if found != own:
        warn(
            f"the picture to edit is {_text(size)}, and the result is {_text(found)}, because large pictures are scaled"
            f" down to look at: for {_whose(size, own, multiple)}, give {_input_flags(own)}"
        )
    return found


def own_size(size: Size, multiple: int, warn: Callable[[str], None]) -> Size:
    """Return the size of an input picture, as near to its own as can be drawn.

    Raises:
        UsageError: It is too small or too narrow.
    """
    found = largest(size, multiple, MAX_SIDE)
    if _whose(size, found, multiple) != OWN:
        warn(f"the input picture is {_text(size)}, more than can be drawn: the result is {_text(found)}")
    _warn_above_recommended(found, warn)
    return found


def size_by_ratio(
    width: int | None,
    height: int | None,
    size: Size,
    multiple: int,
    warn: Callable[[str], None],
    what: str = "the picture",
) -> Size:
    """Return the size whose one side is given and whose other one keeps the ratio of a picture.

    Args:
        width: In pixels; None for the side to find.
        height: Likewise.
        size: The picture's.
        multiple: Sides are multiples of this.
        warn: Told if the size is above what is recommended.
        what: What messages call the picture.

    Raises:
        UsageError: The given side, or the one that follows from it, can't be drawn.
    """
    name, given = ("width", width) if width is not None else ("height", height)
    assert given is not None
    FIELD[name].check(given, multiple)
    scale = given / (size[0] if width is not None else size[1])
    found = _rounded(size, scale, multiple)
    found = (given, found[1]) if width is not None else (found[0], given)
    if not _fits(found):
        raise UsageError(
            f"{name} {given} can't be drawn with the ratio of {what}, which is {_text(size)}: that would be "
            f"{_text(found)}, and sides must be from {MIN_SIDE} to {MAX_SIDE} and their product at most {MAX_AREA}; "
            f"{_cure(size, multiple)}"
        )
    _warn_above_recommended(found, warn)
    return found


def largest(size: Size, multiple: int, side: int = FITTED_SIDE) -> Size:
    """Return the largest size of a picture's ratio: its own, floored, or a smaller one if it is too large.

    Args:
        size: The picture's.
        multiple: Sides are multiples of this.
        side: The longest side.

    Raises:
        UsageError: It is too small or too narrow.
    """
    found = (size[0] // multiple * multiple, size[1] // multiple * multiple)
    scale = min(side / max(size), math.sqrt(MAX_AREA / (size[0] * size[1])))
    if max(size) > side or found[0] * found[1] > MAX_AREA:
        found = _rounded(size, scale, multiple)
        if found[0] * found[1] > MAX_AREA or max(found) > side:
            found = (int(size[0] * scale) // multiple * multiple, int(size[1] * scale) // multiple * multiple)
    if not _fits(found):
        name, short = ("width", found[0]) if found[0] < MIN_SIDE else ("height", found[1])
        raise UsageError(
            f"{name} {short} can't be drawn: the picture is {_text(size)}, and sides must be multiples of {multiple} "
            f"from {MIN_SIDE} to {MAX_SIDE}; {_cure(size, multiple)}"
        )
    return found


def nearest(size: Size, multiple: int) -> Size | None:
    """Return the size near another one that can be drawn and comes closest to its ratio; None if there is none."""
    if min(size) <= 0:
        return None
    scale = min(
        max(1, MIN_SIDE / min(size)),
        MAX_SIDE / max(size),
        math.sqrt(MAX_AREA) / math.sqrt(size[0]) / math.sqrt(size[1]),
    )
    around = [[math.floor(side * scale / multiple) * multiple + step for step in (0, multiple)] for side in size]
    possible = [(width, height) for width in around[0] for height in around[1] if _fits((width, height))]

    def distance(found: Size) -> float:
        return abs(math.log(found[0] / found[1] * size[1] / size[0]))

    return min(possible, key=distance, default=None)


OWN = "its own size"


def _whose(size: Size, found: Size, multiple: int) -> str:
    return OWN if found == tuple(side // multiple * multiple for side in size) else "the largest size that can be drawn"


def _warn_above_recommended(size: Size, warn: Callable[[str], None]) -> None:
    if size[0] * size[1] > RECOMMENDED_AREA:
        warn(
            f"{_text(size)} is above 2 megapixels, the most that Black Forest Labs recommends for FLUX.2: objects may "
            "repeat, and time and memory grow with the square"
        )


def _cure(size: Size, multiple: int) -> str:
    """Say which size comes nearest without distorting a picture."""
    scale = min(max(1, MIN_SIDE / min(size)), FITTED_SIDE / max(size))
    found = _rounded(size, scale, multiple)
    return f"give {_flags(found)}" if _fits(found) else "crop it, or give both width and height (-W, -H)"


def _rounded(size: Size, scale: float, multiple: int) -> Size:
    width, height = (round(side * scale / multiple) * multiple for side in size)
    return width, height


def _fits(size: Size) -> bool:
    return min(size) >= MIN_SIDE and max(size) <= MAX_SIDE and size[0] * size[1] <= MAX_AREA


def _flags(size: Size) -> str:
    return f"width {size[0]} and height {size[1]} (-W {size[0]} -H {size[1]})"


def _input_flags(size: Size) -> str:
    return f"the size input (--size input), which is {_text(size)}"


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
