"""The parameters of a picture inside the picture, so that it can be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from fluxonnx.errors import ImageError

KEY = "fluxonnx"
# EXIF's way to say that a comment is ASCII; JSON escapes everything else.
ASCII_PREFIX = b"ASCII\0\0\0"


def embed(format: str, parameters: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the options for Pillow's save that put `parameters` into a PNG, JPEG or WEBP; none for other formats."""
    text = json.dumps(dict(parameters), sort_keys=True)
    if format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(KEY, text)
        chunks.add_itxt("parameters", readable(parameters))
        for name, value in parameters.items():
            chunks.add_itxt(f"{KEY}:{name}", str(value))
        chunks.add_text("Software", f"fluxonnx {parameters.get('version', '')}".strip())
        return {"pnginfo": chunks}
    if format in ("JPEG", "WEBP"):
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = f"fluxonnx {parameters.get('version', '')}".strip()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = ASCII_PREFIX + text.encode("ascii")
        return {"exif": exif.tobytes()}
    return {}


def readable(parameters: Mapping[Any, Any]) -> str:
    """Return the parameters in the form that gallery programs show (that of AUTOMATIC1111's web UI)."""
    size = f"{parameters.get('width')}x{parameters.get('height')}"
    facts = {
        "Steps": parameters.get("steps"),
        "Seed": parameters.get("seed"),
        "Size": size,
        "Model": parameters.get("model"),
        "Version": f"fluxonnx {parameters.get('version')}",
    }
    return f"{parameters.get('prompt', '')}\n" + ", ".join(f"{key}: {value}" for key, value in facts.items())


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Read the parameters out of a picture that fluxonnx made.

    Raises:
        ImageError: The file can't be read or holds none.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY) if image.format == "PNG" else _from_exif(image)
            parameters = json.loads(text) if text else None
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{path} can't be read: {error}") from None
    if not isinstance(parameters, dict) or "prompt" not in parameters:
        raise ImageError(f"{path} holds no fluxonnx parameters: it was made otherwise, or lost them on its way")
    return parameters


def _from_exif(image: Image.Image) -> str:
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if isinstance(comment, bytes) and comment.startswith(ASCII_PREFIX):
        return comment[len(ASCII_PREFIX) :].decode("ascii", "replace")
    return ""
