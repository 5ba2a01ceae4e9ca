"""What a program may pass as a picture, as pictures, and as a number."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Rational, Real
from typing import Any

import numpy as np
from PIL import Image

from fluxonnx.errors import ImageError, UsageError
from fluxonnx.runtime.field import MOST_BITS, Field
from fluxonnx.runtime.images import BLACK, WHITE, as_rgb, load_image

# A picture: opened by Pillow, a path, or uint8 [height, width], [height, width, 3] or [height, width, 4]
Picture = Image.Image | str | os.PathLike[str] | np.ndarray

EXPECTED = "a PIL image, a path, or a numpy array of uint8 [height, width], [height, width, 3] or [height, width, 4]"


def is_picture(value: object) -> bool:
    """Whether a value is meant as one picture, not as several."""
    return isinstance(value, (Image.Image, str, bytes, os.PathLike, np.ndarray))


def several(value: object) -> tuple[Any, ...]:
    """Return one picture, or an iterable of them, as a tuple.

    Raises:
        UsageError: It is neither.
    """
    if is_picture(value):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise UsageError(f"the images are of type {type(value).__name__}: pass a list of pictures, each {EXPECTED}")
    return tuple(value)


def gray_mask(value: object) -> Image.Image:
    """Return a mask that a program passed in any form of a picture, or as an array of bool, as L.

    It is black where it is transparent.

    Raises:
        UsageError: It is no picture.
        ImageError: Its file or its data can't be read.
    """
    if isinstance(value, np.ndarray) and value.dtype == bool:
        value = value.astype(np.uint8) * 255
    return rgb_picture(value, BLACK).convert("L")


def rgb_picture(value: object, behind: tuple[int, int, int] = WHITE) -> Image.Image:
    """Return a picture that a program passed as RGB, with a colour behind its transparent parts.

    Raises:
        UsageError: It is no picture.
        ImageError: Its file or its data can't be read.
    """
    if isinstance(value, (str, os.PathLike)):
        return load_image(os.fspath(value), behind)
    if isinstance(value, np.ndarray):
        value = _from_array(value)
    if not isinstance(value, Image.Image):
        raise UsageError(f"a picture is of type {type(value).__name__}: pass {EXPECTED}")
    if 0 in value.size:
        raise UsageError(f"a picture is {value.width}x{value.height}: it has no pixels")
    try:
        return as_rgb(value, behind)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reads the pixels of a file only now
        name = getattr(value, "filename", "") or "a picture"
        raise ImageError(f"{name} can't be read: {error}") from None


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        cure = ": convert it with (array * 255).round().astype(numpy.uint8) if it is in [0, 1]"
        raise UsageError(
            f"a picture is an array of {array.dtype}, expected uint8{cure if array.dtype.kind == 'f' else ''}"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise UsageError(f"a picture is an array of shape {list(array.shape)}: pass {EXPECTED}")
    if 0 in array.shape:
        raise UsageError(f"a picture is an array of shape {list(array.shape)}: it has no pixels")
    return Image.fromarray(np.ascontiguousarray(array))


def plain(field: Field, value: Any) -> Any:
    """Return a value in Python's own type where it is clear what is meant; anything else for `Field.check` to refuse.

    64.0 is clear where an integer is expected, and so is a number of numpy, which JSON could not hold.
    """
    if field.many:
        if not isinstance(value, Iterable) or isinstance(value, (str, Mapping)):
            return value
        return tuple(_plain_one(field, item) for item in value)
    return _plain_one(field, value)


def _plain_one(field: Field, value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if type(value) is int:
        return (math.inf if value > 0 else -math.inf) if _is_huge(field, value) else value
    if isinstance(value, Integral):
        return int(value)
    if field.kind is int:
        if isinstance(value, Rational):
            return value.numerator if value.denominator == 1 else value
        return int(float(value)) if float(value).is_integer() else value
    return float(value)


def _is_huge(field: Field, value: int) -> bool:
    """Whether an integer is out of every range and might not even be a float."""
    return field.kind is float and value.bit_length() > MOST_BITS
