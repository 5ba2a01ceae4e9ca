"""Inpainting: which part of a picture is drawn anew, at which size, and how the result is put back.

Source of the rules unless stated otherwise: diffusers, pipelines/flux2/pipeline_flux2_klein_inpaint.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from fluxonnx.errors import UsageError
from fluxonnx.runtime.images import fit_start

# From this value on, a pixel of a mask is white (VaeImageProcessor.binarize, diffusers image_processor.py).
WHITE = 128
# Where a smaller share of the white pixels lies in tokens that the reference repaints, the mask has parts that are
# thinner than a token. Over random places, discs of 48 pixels have 0.69 or more, lines of 16 pixels 0.68 or more, and
# half of the lines of 8 pixels less than 0.61.
LEAST_COVER = 0.65

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Canvas:
    """A picture of which a part is drawn anew.

    Attributes:
        whole: The picture, RGB.
        mask: How much of the new picture is shown: L, of the size of `whole`; 0 keeps a pixel as it is.
        box: The part of `whole` that is drawn: left, top, right, bottom.
        size: The width and height at which it is drawn.
        keep: Whether the mask is used again on the pixels; otherwise the whole box is replaced.
    """

    whole: Image.Image
    mask: Image.Image
    box: Box
    size: tuple[int, int]
    keep: bool

    def start(self) -> Image.Image:
        """Return the picture that the drawing starts from: RGB of `size`."""
        return _resized(self.whole.crop(self.box), self.size)

    def area(self, unit: int) -> np.ndarray:
        """Return how much of each latent token is drawn anew: f32 [1, image_seq, 1] in [0, 1].

        It is the reference's, which looks at the four pixels in the middle of each token (prepare_mask_latents). Of a
        mask with thinner parts, which would be missed, every token that has a white pixel is drawn.
        """
        white = np.asarray(_resized(self.mask.crop(self.box), self.size)) >= WHITE
        rows, columns = (side // unit for side in white.shape)
        tokens = white.reshape(rows, unit, columns, unit).swapaxes(1, 2)
        middle = np.s_[:, :, unit // 2 - 1 : unit // 2 + 1, unit // 2 - 1 : unit // 2 + 1]
        area = tokens[middle].mean((2, 3), dtype=np.float32)
        if tokens[area > 0].sum() < LEAST_COVER * tokens.sum():
            area = tokens.any((2, 3)).astype(np.float32)
        return area.reshape(1, -1, 1)

    def finish(self, drawn: Image.Image) -> Image.Image:
        """Put the drawn picture, RGB of `size`, into the whole one."""
        left, top, right, bottom = self.box
        piece, result = _resized(drawn, (right - left, bottom - top)), self.whole.copy()
        result.paste(piece, (left, top), self.mask.crop(self.box) if self.keep else None)
        return result


def expanded(
    image: Image.Image, mask: Image.Image | None, borders: Sequence[int]
) -> tuple[Image.Image, Image.Image | None]:
    """Add borders to a picture, and to the mask where they are white.

    The border repeats the edge, which is what the autoencoder and the model see there.

    Args:
        image: RGB.
        mask: L, of the size of the picture; None if nothing else is drawn anew.
        borders: Pixels at the left, top, right and bottom.
    """
    left, top, right, bottom = borders
    around = ((top, bottom), (left, right))
    found = np.zeros((image.height, image.width), np.uint8) if mask is None else np.asarray(mask)
    return (
        Image.fromarray(np.pad(np.asarray(image), (*around, (0, 0)), mode="edge")),
        Image.fromarray(np.pad(found, around, constant_values=255)),
    )


def fit_mask(mask: Image.Image, size: tuple[int, int], warn: Callable[[str], None]) -> Image.Image:
    """Return a mask at the size of its picture, in black and white.

    Args:
        mask: L, of any size.
        size: The picture's.
        warn: Told if the mask has another size.

    Raises:
        UsageError: Nothing of it is white.
    """
    if mask.size != size:
        warn(
            f"the mask is {mask.width}x{mask.height} and the picture {size[0]}x{size[1]}: the mask is resized"
            + ("" if abs(mask.width * size[1] - mask.height * size[0]) <= max(size) * 2 else ", which distorts it")
        )
    mask = _resized(mask, size).point(lambda value: 255 if value >= WHITE else 0)
    if mask.getbbox() is None:
        raise UsageError("the mask has no white part, so nothing would be repainted: paint white what is to change")
    return mask


def lay_out(
    image: Image.Image,
    mask: Image.Image,
    size: tuple[int, int],
    unit: int,
    *,
    blur: float,
    crop: int | None,
    keep: bool,
) -> Canvas:
    """Decide what is drawn.

    Args:
        image: RGB.
        mask: Black and white, of the size of the picture.
        size: The width and height to draw at.
        unit: Pixels along each side of a latent token.
        blur: The radius in pixels by which the edge of the mask is softened.
        crop: Draw only the neighbourhood of the white part, with so many pixels around it; None for the whole picture.
        keep: See `Canvas`.
    """
    if crop is not None:
        box = neighbourhood(mask, size, crop)
        return Canvas(image, _blurred(mask, blur), box, size, keep)
    image, mask = (fit_start(picture, *size, unit) for picture in (image, mask))
    return Canvas(image, _blurred(mask, blur), (0, 0, *size), size, keep)


def neighbourhood(mask: Image.Image, size: tuple[int, int], pad: int) -> Box:
    """Return a box around the white part of a mask, with the ratio of `size` where the picture has room for it.

    Source: VaeImageProcessor.get_crop_region, diffusers image_processor.py.
    """
    box = mask.getbbox()
    assert box is not None
    x1, y1 = max(box[0] - pad, 0), max(box[1] - pad, 0)
    x2, y2 = min(box[2] + pad, mask.width), min(box[3] + pad, mask.height)
    ratio = size[0] / size[1]
    if (x2 - x1) / (y2 - y1) > ratio:
        y1, y2 = _widened(y1, y2, (x2 - x1) / ratio, mask.height)
    else:
        x1, x2 = _widened(x1, x2, (y2 - y1) * ratio, mask.width)
    return x1, y1, x2, y2


def _widened(low: int, high: int, wanted: float, most: int) -> tuple[int, int]:
    missing = int(wanted - (high - low))
    low, high = low - missing // 2, high + missing - missing // 2
    if high >= most:
        low, high = low - (high - most), most
    if low < 0:
        low, high = 0, high - low
    return low, min(high, most)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _blurred(mask: Image.Image, radius: float) -> Image.Image:
    return mask.filter(ImageFilter.GaussianBlur(radius)) if radius else mask
