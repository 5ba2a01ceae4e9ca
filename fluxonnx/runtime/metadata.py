"""The parameters of a picture, stored in the picture itself so that it can be made again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from fluxonnx.checkpoint.reading import open_regular, parse_json
from fluxonnx.errors import ImageError
from fluxonnx.runtime import png
from fluxonnx.runtime.fields import FIELDS

KEY = "fluxonnx"
# The tag of EXIF that holds the parameters, in ASCII, since JSON escapes everything else. The comment of users holds
# them as other programs know them; before there were two, it held ours.
HISTORY = ExifTags.Base.ImageHistory
# The prefixes by which EXIF names the encoding of a comment.
ASCII_PREFIX = b"ASCII\0\0\0"
UNICODE_PREFIX = b"UNICODE\0"
# A JPEG segment stores its length in 16 bits.
MAX_JPEG_EXIF = 65533


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture; any failure with the file, here or in the block, becomes an ImageError.

    Raises:
        ImageError: The file is missing, not an image, damaged, or absurdly large.
    """
    try:
        # Pillow warns above 89 million pixels, which real cameras reach, and rejects twice that.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with open_regular(path) as file:
                source, profile = png.readable(file)
                with Image.open(source) as image:
                    if profile:
                        image.info["icc_profile"] = profile
                    yield image
    except MemoryError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder, not an image") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image that Pillow can read: convert it to PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path} has too many pixels: scale it down first") from None
    except Exception as error:  # the readers of Pillow raise almost anything for a damaged file, even struct.error
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(f"{path} can't be read: {error.strerror}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path} can't be read, it seems damaged: {reason}") from None


def embed(format: str, parameters: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the options for Pillow's save that put `parameters` into a PNG, JPEG or WEBP; none for other formats.

    Parameters that can't be embedded are left out with a warning: the picture may have taken an hour.
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
        # the encoding and the byte order of piexif.helper.UserComment, with which the web UI reads it
        comment = UNICODE_PREFIX + _utf8(readable(parameters)).encode("utf-16-be")
        for known in (True, False):
            exif = Image.Exif()
            exif[ExifTags.Base.Software] = _software(parameters)
            tags = exif.get_ifd(ExifTags.IFD.Exif)
            tags[HISTORY] = text
            if known:
                tags[ExifTags.Base.UserComment] = comment
            data = exif.tobytes()
            if format != "JPEG" or len(data) <= MAX_JPEG_EXIF:
                return {"exif": data}
        warnings.warn("the parameters are too long for a JPEG and were left out: PNG has room", stacklevel=4)
    return {}


def _software(parameters: Mapping[Any, Any]) -> str:
    return f"fluxonnx {parameters.get('version', '')}".strip()


def _utf8(text: str) -> str:
    """Replace lone surrogates, as which Python holds the bytes of a file name that is not valid UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


# The names of samplers and schedules in AUTOMATIC1111's web UI (modules/sd_samplers_kdiffusion.py, sd_schedulers.py).
A1111_NAMES = {"euler": "Euler", "heun": "Heun", "dpmpp-2m": "DPM++ 2M", "flow": "Simple", "linear": "Normal"}


def readable(parameters: Mapping[Any, Any]) -> str:
    """Return the parameters in the form of AUTOMATIC1111's web UI, which gallery programs show.

    Source: create_infotext and parse_generation_parameters, modules/processing.py and infotext_utils.py.
    """
    facts = {
        "Steps": parameters.get("steps"),
        "Sampler": _a1111_name(parameters.get("sampler")),
        "Schedule type": _a1111_name(parameters.get("schedule")),
        "CFG scale": parameters.get("guidance_scale"),
        "Seed": parameters.get("seed"),
        "Size": f"{parameters['width']}x{parameters['height']}" if {"width", "height"} <= parameters.keys() else None,
        "Model": parameters.get("model"),
        "Denoising strength": parameters.get("strength"),
        "Mask blur": parameters.get("mask_blur"),
        "Version": _software(parameters),
    }
    known = ", ".join(f"{key}: {_quoted(value)}" for key, value in facts.items() if value is not None)
    negative = parameters.get("negative_prompt")
    return f"{parameters.get('prompt', '')}\n" + (f"Negative prompt: {negative}\n" if negative else "") + known


def _a1111_name(name: Any) -> Any:
    return A1111_NAMES.get(name, name) if isinstance(name, str) else name


def _quoted(value: Any) -> str:
    """Quote a value that holds what separates others (infotext_utils.quote)."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(letter in text for letter in ",:\n") else text


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Read the parameters in a picture that fluxonnx made.

    Raises:
        ImageError: The file can't be read or holds none.
    """
    with opened(path) as image:
        text = _from_png(image) if image.format == "PNG" else _from_exif(image)
    try:
        parameters = parse_json(text) if text else None
    except ValueError:
        raise ImageError(f"{path} holds damaged fluxonnx parameters: use an untouched copy of the picture") from None
    if not isinstance(parameters, dict) or "prompt" not in parameters:
        raise ImageError(f"{path} holds no fluxonnx parameters: another program made it or removed them")
    return parameters


def read_values(path: str | Path) -> dict[str, Any]:
    """Read the parameters that are needed to make a picture again, and check their types; other keys are ignored.

    Raises:
        ImageError: As `read_parameters`, and for a parameter of another type than the table of fields says.
    """
    parameters = read_parameters(path)
    values = {}
    for field in FIELDS:
        if "picture" in field.places and field.name in parameters:
            values[field.name] = parameters[field.name]
            if error := field.type_error(values[field.name]):
                raise ImageError(f"{path} holds damaged fluxonnx parameters: {error}")
    return values


def _from_png(image: Image.Image) -> str:
    # `text` decodes the whole picture, to find chunks that another program moved behind the pixels.
    return image.info.get(KEY) or getattr(image, "text", {}).get(KEY, "")


def _from_exif(image: Image.Image) -> str:
    try:
        tags = image.getexif().get_ifd(ExifTags.IFD.Exif)
        history, comment = tags.get(HISTORY, ""), tags.get(ExifTags.Base.UserComment, b"")
    except Exception:  # as in `images.upright`
        return ""
    if isinstance(history, str) and history.startswith("{"):
        return history.rstrip("\0")
    if not isinstance(comment, bytes):
        return ""
    prefix, data = comment[:8], comment[8:]
    if prefix == UNICODE_PREFIX:  # from a program that rewrote it; EXIF does not say in which byte order
        return data.decode("utf-16-le" if data[:2] == b"{\0" else "utf-16-be", "replace")
    # Anything but a JSON object is the comment of a camera or of another program.
    return data.decode("ascii", "replace") if prefix == ASCII_PREFIX and data[:1] == b"{" else ""
