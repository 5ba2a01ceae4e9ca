"""Writing pictures: the format that a name stands for, the check of a name before a run, and the file itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fluxonnx.errors import ImageError, UsageError
from fluxonnx.files import atomic_write, describe_os_error, probe
from fluxonnx.runtime import metadata

FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
    ".ppm": {"format": "PPM"},
}


def check_output_path(path: str | Path) -> None:
    """Check before a long run that `path` can be written.

    Raises:
        UsageError: Its suffix is unknown, its folder does not exist, or it is a folder.
        ImageError: There is no permission.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} can't be written: the name must end in one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"folder {path.parent} does not exist: create it, or choose another -o")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: choose a file name for -o")
    try:
        probe(path)
    except OSError as error:
        raise ImageError(describe_os_error(error, path)) from None


def save_image(image: Image.Image, path: str | Path, parameters: Mapping[Any, Any] | None = None) -> None:
    """Write a picture, whole or not at all, in the format its suffix names.

    JPEG is written at quality 95 without chroma subsampling, WebP losslessly.

    Args:
        image: RGB.
        path: .png, .jpg, .jpeg, .webp or .ppm.
        parameters: What made the picture; written into PNG text chunks, or into EXIF for JPEG and WebP.

    Raises:
        UsageError: The suffix is unknown or the folder does not exist.
        ImageError: The file can't be written.
    """
    path = Path(path)
    check_output_path(path)
    options = FORMATS[path.suffix.lower()]
    extra = metadata.embed(options["format"], parameters) if parameters else {}
    try:
        with atomic_write(path) as temporary:
            clean = image.copy()
            clean.info = {}
            clean.save(temporary, **options, **extra)
    except OSError as error:
        raise ImageError(describe_os_error(error, path)) from None
    except ValueError as error:  # a picture that is too large for the format, such as a WebP of 16384 pixels
        raise ImageError(f"can't write {path}: {error}") from None
