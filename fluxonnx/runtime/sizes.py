"""The size of the output: what was asked for, else that of an input picture as far as it can be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import FIELD, MAX_SIDE, MIN_SIDE

Size = tuple[int, int]


def asked_size(width: int | None, height: int | None, multiple: int, defaults: Mapping[str, int]) -> Size:
    """Return the size of a picture without inputs.

    Raises:
        UsageError: It can't be drawn.
    """
    size = (defaults["width"] if width is None else width, defaults["height"] if height is None else height)
    for name, side in zip(("width", "height"), size, strict=True):
        FIELD[name].check(side, multiple)
    return size


def painted_size(size: Size, multiple: int, warn: Callable[[str], None]) -> Size:
    """Return the size of a picture that is painted over: its own, or the largest of its ratio that can be drawn.

    Args:
        size: The picture's.
        multiple: Sides are multiples of this.
        warn: Told if the picture is scaled.

    Raises:
        UsageError: It is too small or too narrow.
    """
    found = largest(size, multiple)
    if max(size) > MAX_SIDE:
        warn(f"the picture to paint over is {_text(size)}, more than can be drawn: the result is {_text(found)}")
    return found


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
    most = largest(size, multiple)
    found = largest(encoded, multiple) if max(encoded) <= MAX_SIDE else most
    if found == most and max(size) > MAX_SIDE:
        warn(f"the picture to edit is {_text(size)}, more than can be drawn: the result is {_text(found)}")
    elif found != most:
        whose = "its own size" if max(size) <= MAX_SIDE else "the largest size that can be drawn"
        warn(
            f"the picture to edit is {_text(size)}, and the result is {_text(found)}, because pictures to look at are "
            f"scaled to 1 megapixel: for {whose}, give {_flags(most)}"
        )
    return found


def size_by_ratio(width: int | None, height: int | None, size: Size, multiple: int) -> Size:
    """Return the size whose one side is given and whose other one keeps the ratio of a picture.

    Args:
        width: In pixels; None for the side to find.
        height: Likewise.
        size: The picture's.
        multiple: Sides are multiples of this.

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
            f"{name} {given} can't be drawn with the ratio of the picture, which is {_text(size)}: that would be "
            f"{_text(found)}, and sides must be from {MIN_SIDE} to {MAX_SIDE}; {_cure(size, multiple)}"
        )
    return found


def largest(size: Size, multiple: int) -> Size:
    """Return the largest size that can be drawn of a picture: floored, or scaled with its ratio if it is too large.

    Raises:
        UsageError: It is too small or too narrow.
    """
    if max(size) <= MAX_SIDE:
        found = (size[0] // multiple * multiple, size[1] // multiple * multiple)
    else:
        found = _rounded(size, MAX_SIDE / max(size), multiple)
    if not _fits(found):
        name, side = ("width", found[0]) if found[0] < MIN_SIDE else ("height", found[1])
        raise UsageError(
            f"{name} {side} can't be drawn: the picture is {_text(size)}, and sides must be multiples of {multiple} "
            f"from {MIN_SIDE} to {MAX_SIDE}; {_cure(size, multiple)}"
        )
    return found


def _cure(size: Size, multiple: int) -> str:
    """Say which size comes nearest without distorting a picture."""
    scale = min(max(1, MIN_SIDE / min(size)), MAX_SIDE / max(size))
    nearest = _rounded(size, scale, multiple)
    return f"give {_flags(nearest)}" if _fits(nearest) else "crop it, or give both width and height (-W, -H)"


def _rounded(size: Size, scale: float, multiple: int) -> Size:
    width, height = (round(side * scale / multiple) * multiple for side in size)
    return width, height


def _fits(size: Size) -> bool:
    return min(size) >= MIN_SIDE and max(size) <= MAX_SIDE


def _flags(size: Size) -> str:
    return f"width {size[0]} and height {size[1]} (-W {size[0]} -H {size[1]})"


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
