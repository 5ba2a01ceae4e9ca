"""Small previews: neighbouring latent pixels are averaged, so that the decoder has less to do.

With the autoencoder of the 4B model, a preview takes a quarter of the time of the whole picture at 512x512. With the
bundled demo model on two cores, previews at 128x128, 512x512 and 1024x1024 take 0.01, 0.15 and 0.15 s, whole pictures
0.04, 0.6 and 3.6 s. Loading the decoder comes on top of the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from fluxonnx.runtime.images import sample_to_image

# The longer side of a preview in pixels, at most. Pictures of up to 512 become half as large, so that their preview
# takes a quarter of the decoder's work; larger ones shrink further.
PREVIEW_SIDE = 256


def preview_factor(width: int, height: int) -> int:
    """Return how many times smaller the preview of a picture is, along each side."""
    return max(2, math.ceil(max(width, height) / PREVIEW_SIDE))


def draw_preview(decode: Callable[[np.ndarray], np.ndarray], latents: np.ndarray, unit: int) -> Image.Image:
    """Decode a small version of a picture.

    Args:
        decode: Latents f32 [1, channels, rows, columns] -> f32 [1, 3, height, width] in [-1, 1].
        latents: f32 [1, channels, rows, columns].
        unit: Pixels along each side of a latent token.
    """
    height, width = (side * unit for side in latents.shape[2:])
    factor = preview_factor(width, height)
    image = sample_to_image(decode(shrink(latents, factor)))
    return image.crop((0, 0, math.ceil(width / factor), math.ceil(height / factor)))


def shrink(latents: np.ndarray, factor: int) -> np.ndarray:
    """Average blocks of `factor` x `factor` latent pixels.

    A latent token holds 2x2 latent pixels in its channels, those of one latent channel side by side (_patchify_latents,
    diffusers pipeline_flux2_klein.py). Where blocks or tokens are incomplete, the last row and column are repeated.

    Averages of whole tokens would mix latent pixels that are not neighbours (measured with the bundled demo model,
    median of 12 previews at half size: 22.7 dB from the downscaled picture, against 29.6 dB).

    Args:
        latents: f32 [batch, 4 * latent channels, rows, columns].
        factor: At least 1.

    Returns:
        f32 [batch, 4 * latent channels, ceil(rows / factor), ceil(columns / factor)].
    """
    batch, channels, rows, columns = latents.shape
    tokens = latents.reshape(batch, channels // 4, 2, 2, rows, columns)
    pixels = tokens.transpose(0, 1, 4, 2, 5, 3).reshape(batch, channels // 4, 2 * rows, 2 * columns)
    down, right = (math.ceil(side / factor) for side in (rows, columns))
    missing = [(0, 2 * factor * small - 2 * side) for small, side in ((down, rows), (right, columns))]
    pixels = np.pad(pixels, [(0, 0), (0, 0), *missing], mode="edge")
    blocks = pixels.reshape(batch, channels // 4, 2 * down, factor, 2 * right, factor).mean((3, 5))
    small = blocks.reshape(batch, channels // 4, down, 2, right, 2).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(small, np.float32).reshape(batch, channels, down, right)
