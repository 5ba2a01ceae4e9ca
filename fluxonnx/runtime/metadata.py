"""The parameters of a picture inside the picture, so that it can be made again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from fluxonnx.errors import ImageError

KEY = "fluxonnx"
# How EXIF says in which encoding a comment is. We write ASCII, since JSON escapes everything else.
ASCII_PREFIX = b"ASCII\0\0\0"
UNICODE_PREFIX = b"UNICODE\0"
# The length of a JPEG segment is 16 bits.
MAX_JPEG_EXIF = 65533


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture; whatever goes wrong with the file, here or in the block, becomes an ImageError.

    Raises:
        ImageError: The file is missing, not an image, damaged, or absurdly large.
    """
    try:
        # Pillow warns above 89 million pixels, which real cameras reach, and refuses twice that.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder, not an image") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image that Pillow can read: convert it to PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path} has too many pixels: scale it down first") from None
    except Exception as error:  # Pillow's readers raise almost anything for a damaged file, struct.error included
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(f"{path} can't be read: {error.strerror}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path} can't be read, it seems damaged: {reason}") from None


def embed(format: str, parameters: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the options for Pillow's save that put `parameters` into a PNG, JPEG or WEBP; none for other formats.

    What can't be embedded never costs the picture: it may have taken an hour.
    """
    text = json.dumps(dict(parameters), sort_keys=True, default=str)
    if format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(KEY, text)
        chunks.add_itxt("parameters", _utf8(readable(parameters)))
        for name, value in parameters.items():
            chunks.add_itxt(f"{KEY}:{name}", _utf8(str(value)))
        chunks.add_text("Software", _software(parameters))
        return {"pnginfo": chunks}
    if format in ("JPEG", "WEBP"):
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = _software(parameters)
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = ASCII_PREFIX + text.encode("ascii")
        data = exif.tobytes()
        if format == "JPEG" and len(data) > MAX_JPEG_EXIF:
            warnings.warn("the parameters are too long for a JPEG and were left out: PNG has room", stacklevel=4)
            return {}
        return {"exif": data}
    return {}


def _software(parameters: Mapping[Any, Any]) -> str:
    return f"fluxonnx {parameters.get('version', '')}".strip()


def _utf8(text: str) -> str:
    """Replace what UTF-8 can't hold: file names may be bytes of any kind, which Python keeps as lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


def readable(parameters: Mapping[Any, Any]) -> str:
    """Return the parameters in the form that gallery programs show (that of AUTOMATIC1111's web UI)."""
    facts = {
        "Steps": parameters.get("steps"),
        "Seed": parameters.get("seed"),
        "Size": f"{parameters['width']}x{parameters['height']}" if {"width", "height"} <= parameters.keys() else None,
        "Model": parameters.get("model"),
        "Version": _software(parameters),
    }
    known = ", ".join(f"{key}: {value}" for key, value in facts.items() if value is not None)
    return f"{parameters.get('prompt', '')}\n{known}"


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Read the parameters out of a picture that fluxonnx made.

    Raises:
        ImageError: The file can't be read or holds none.
    """
    with opened(path) as image:
        text = _from_png(image) if image.format == "PNG" else _from_exif(image)
    try:
        parameters = json.loads(text) if text else None
    except (ValueError, RecursionError):
        raise ImageError(f"{path} holds damaged fluxonnx parameters: use an untouched copy of the picture") from None
    if not isinstance(parameters, dict) or "prompt" not in parameters:
        raise ImageError(f"{path} holds no fluxonnx parameters: it was made otherwise, or lost them on its way")
    return parameters


def _from_png(image: Image.Image) -> str:
    # `text` decodes the whole picture to find chunks that another program moved behind the pixels.
    return image.info.get(KEY) or getattr(image, "text", {}).get(KEY, "")


def _from_exif(image: Image.Image) -> str:
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if not isinstance(comment, bytes):
        return ""
    prefix, data = comment[:8], comment[8:]
    if prefix == UNICODE_PREFIX:  # from a program that rewrote it; EXIF does not say in which byte order
        return data.decode("utf-16-le" if data[:2] == b"{\0" else "utf-16-be", "replace")
    # The comment of a camera or of another program is no JSON, and none of ours.
    return data.decode("ascii", "replace") if prefix == ASCII_PREFIX and data[:1] == b"{" else ""
