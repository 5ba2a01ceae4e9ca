"""Pixels in and out: files of any kind to RGB, RGB to the VAE's input, and back."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime import metadata

# The limits and the area cap of Flux2ImageProcessor, diffusers pipelines/flux2/image_processor.py.
MIN_REFERENCE_SIDE = 64
MAX_REFERENCE_RATIO = 8
MAX_REFERENCE_AREA = 1024 * 1024

# In files of these formats, several frames are several pictures, and only one of them is used: a person should know.
# In other formats they are a picture and its preview, depth map (MPO, from phones) or layers (PSD).
SEVERAL_FRAMES = {
    "GIF": "is animated: only its first frame is used",
    "PNG": "is animated: only its first frame is used",
    "WEBP": "is animated: only its first frame is used",
    "AVIF": "is animated: only its first frame is used",
    "TIFF": "has several pages: only the first is used",
}


# Where Pillow looks for the orientation of a picture.
ORIENTED_BY = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


# What lies behind the transparent parts of a picture, and of a mask, which are not to be repainted.
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def load_image(path: str | Path, behind: tuple[int, int, int] = WHITE) -> Image.Image:
    """Read a picture as a viewer shows it: upright, sRGB, 8 bits, on white where it is transparent.

    Of an animation, the first frame is used, with a warning.

    Args:
        path: The file.
        behind: Another colour than white.

    Returns:
        An RGB picture.

    Raises:
        ImageError: The file is missing, not an image, damaged, or absurdly large.
    """
    with metadata.opened(path) as image:
        notice = SEVERAL_FRAMES.get(image.format or "") if getattr(image, "n_frames", 1) > 1 else None
        picture = as_rgb(image, behind)
    if notice:
        warnings.warn(f"{path} {notice}", stacklevel=2)
    return picture


def as_rgb(image: Image.Image, behind: tuple[int, int, int] = WHITE) -> Image.Image:
    """Convert any picture to RGB as a viewer shows it; see `load_image`."""
    profile = image.info.get("icc_profile")
    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        # La, with alpha multiplied in, converts to LA only
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*behind, 255))
        image = Image.alpha_composite(paper, image).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGB")
    if profile and image.mode in ("L", "RGB", "CMYK"):
        image = _to_srgb(image, profile)
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF or XMP says; where these are damaged, the picture stays as it is."""
    image.load()  # outside the block: a picture with damaged pixels is an error
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises almost anything for damaged EXIF: SyntaxError, struct.error, KeyError, ...
        return image.copy()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of a damaged tag beside the orientation
        plain, exif = image.copy(), Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        plain.info = {key: value for key, value in image.info.items() if key not in ORIENTED_BY}
        plain.info["exif"] = exif.tobytes()
        return ImageOps.exif_transpose(plain)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray (and float in [0, 1]) to 8 bits; Pillow's own conversion would clip it."""
    values = np.asarray(image)
    if image.mode == "F":
        scaled = np.clip(np.nan_to_num(values), 0, 1) * 255
    elif image.mode.startswith("I;16") or values.max(initial=0) > 255:
        scaled = np.clip(values, 0, 65535) / 257
    else:
        scaled = np.clip(values, 0, 255)
    gray = Image.fromarray(np.rint(scaled).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the one value of a PNG that is transparent, in its 16 bits
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ImportError, TypeError, ValueError):
        # A damaged profile, or one for another mode, which viewers ignore, too; or a Pillow without LittleCMS.
        return image
    return converted if converted is not None else image


def fit_reference(image: Image.Image, multiple: int = 16, area: float = MAX_REFERENCE_AREA) -> Image.Image:
    """Scale and crop a reference picture as diffusers' klein pipeline does.

    The area is capped. Sides are floored to multiples of `multiple`, by cropping evenly.

    Source: "4. process images", diffusers pipeline_flux2_klein.py, and Flux2ImageProcessor.

    Args:
        image: RGB.
        multiple: Sides become multiples of this: the VAE's factor times the patch size.
        area: The most pixels, by default 1024 * 1024.

    Raises:
        UsageError: A side is under 64 pixels, or one is more than 8 times the other.
    """
    width, height = image.size
    if min(width, height) < MIN_REFERENCE_SIDE:
        raise UsageError(f"a reference image is {width}x{height}: both sides must be at least {MIN_REFERENCE_SIDE}")
    if max(width, height) > MAX_REFERENCE_RATIO * min(width, height):
        raise UsageError(
            f"a reference image is {width}x{height}: one side may be at most {MAX_REFERENCE_RATIO} times the other"
        )
    if width * height > area:
        scale = math.sqrt(area / (width * height))
        width, height = int(width * scale), int(height * scale)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return crop_center(image, width // multiple * multiple, height // multiple * multiple)


def digest(image: Image.Image) -> str:
    """Return a short hash of a picture's size and pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]


def crop_center(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cut `width` x `height` out of the middle."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fill(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale and crop so that the picture covers exactly `width` x `height`."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def fit_start(image: Image.Image, width: int, height: int, multiple: int) -> Image.Image:
    """Return the picture that image-to-image starts from, at the size of the output.

    If only a border of less than `multiple` is too much, it is cropped, so that the rest keeps its pixels. Pictures of
    other sizes are scaled to fill.
    """
    if 0 <= image.width - width < multiple and 0 <= image.height - height < multiple:
        return crop_center(image, width, height)
    return fill(image, width, height)


def image_to_sample(image: Image.Image) -> np.ndarray:
    """RGB -> float32 [1, 3, height, width] in [-1, 1] (VaeImageProcessor.preprocess, diffusers image_processor.py)."""
    pixels = np.asarray(image, np.float32) / np.float32(255)
    return np.ascontiguousarray((pixels * 2 - 1).transpose(2, 0, 1)[None])


def sample_to_image(sample: np.ndarray) -> Image.Image:
    """float32 [3, height, width] or [1, 3, height, width], about in [-1, 1] -> RGB.

    Source: VaeImageProcessor.postprocess, diffusers image_processor.py: clipped, then rounded half to even.

    Raises:
        FluxonnxError: The sample is not finite.
    """
    if sample.ndim == 4:
        (sample,) = sample
    if not np.isfinite(sample).all():
        raise FluxonnxError("the model produced NaNs or infinities instead of a picture: its weights may be damaged")
    pixels = np.clip(sample * np.float32(0.5) + np.float32(0.5), 0, 1).transpose(1, 2, 0)
    return Image.fromarray(np.round(pixels * 255).astype(np.uint8))
