"""Writing pictures: the format that a name stands for, the check of a name before a run, and the file itself."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fluxonnx.errors import FluxonnxError, ImageError, UsageError
from fluxonnx.files import describe_os_error
from fluxonnx.runtime import metadata
from fluxonnx.runtime.outputs import check_output, write_numbered, write_output

FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
    ".ppm": {"format": "PPM"},
}


# The options of an animation, by its suffix.
ANIMATIONS: dict[str, dict[str, Any]] = {
    ".gif": {"format": "GIF"},
    ".webp": {"format": "WEBP", "quality": 90},
}
# How long its frames and its last one are shown, in milliseconds.
FRAME_TIME, LAST_TIME = 300, 2000


def check_output_path(path: str | Path, numbered: bool = False) -> None:
    """Check before a long run that `path` can be written.

    Args:
        path: .png, .jpg, .jpeg, .webp or .ppm.
        numbered: Whether a number will be added to the name.

    Raises:
        UsageError: Its suffix is unknown, its folder does not exist, it is a folder, or its name is too long.
        ImageError: There is no permission.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} can't be written: the name must end in one of {', '.join(FORMATS)}")
    try:
        check_output(path, numbered=numbered)
    except UsageError:
        raise
    except FluxonnxError as error:
        raise ImageError(str(error)) from None


def save_image(
    image: Image.Image, path: str | Path, parameters: Mapping[Any, Any] | None = None, numbered: bool = False
) -> Path:
    """Write a picture, whole or not at all, in the format its suffix names.

    JPEG is written at quality 95 without chroma subsampling, WebP losslessly.

    Args:
        image: RGB.
        path: .png, .jpg, .jpeg, .webp or .ppm.
        parameters: What made the picture; written into PNG text chunks, or into EXIF for JPEG and WebP.
        numbered: Whether to add the first number to the name that is free, so that nothing is overwritten.

    Returns:
        The path of the file.

    Raises:
        UsageError: The suffix is unknown or the folder does not exist.
        ImageError: The file can't be written.
    """
    path = Path(path)
    check_output_path(path, numbered)
    return _written(path, numbered, encoded(image, path.suffix, parameters, path))


def encoded(
    image: Image.Image, suffix: str, parameters: Mapping[Any, Any] | None = None, name: object = "the picture"
) -> bytes:
    """Return the content of a picture's file; see `save_image`.

    Args:
        image: RGB.
        suffix: .png, .jpg, .jpeg, .webp or .ppm.
        parameters: What made the picture.
        name: What messages call the file.

    Raises:
        ImageError: The format can't hold such a picture.
    """
    options = FORMATS[suffix.lower()]
    extra = metadata.embed(options["format"], parameters) if parameters else {}
    clean = image.copy()
    clean.info = {}
    return _content(clean, name, **options, **extra)


def save_animation(frames: Sequence[Image.Image], path: Path, numbered: bool = False) -> Path:
    """Write an animation, whole or not at all; all frames get the size of the last one.

    Args:
        frames: RGB.
        path: .gif or .webp.
        numbered: See `save_image`.

    Returns:
        The path of the file.

    Raises:
        ImageError: The file can't be written.
    """
    *others, last = frames
    scaled = [frame.resize(last.size, Image.Resampling.BICUBIC) for frame in others]
    times = [FRAME_TIME] * len(scaled) + [LAST_TIME]
    clean = [frame.copy() for frame in (*scaled, last)]
    for frame in clean:
        frame.info = {}
    options = ANIMATIONS[path.suffix.lower()]
    content = _content(clean[0], path, save_all=True, append_images=clean[1:], duration=times, loop=0, **options)
    return _written(path, numbered, content)


def _content(image: Image.Image, name: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, **options)
    except OSError as error:
        raise ImageError(describe_os_error(error, name)) from None
    except ValueError as error:  # too large for the format, such as a WebP of 16384 pixels
        raise ImageError(f"can't write {name}: {error}") from None
    return buffer.getvalue()


def _written(path: Path, numbered: bool, content: bytes) -> Path:
    try:
        if numbered:
            return write_numbered(path, content)
        write_output(path, content)
    except OSError as error:
        raise ImageError(describe_os_error(error, path)) from None
    return path
