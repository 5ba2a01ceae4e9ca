"""Small previews: from the decoder, of averaged latent pixels, or from a linear map of latents to colours.

With the autoencoder of the 4B model, a preview takes a quarter of the time of the whole picture at 512x512. With the
bundled demo model on two cores, previews at 128x128, 512x512 and 1024x1024 take 0.01, 0.15 and 0.15 s, whole pictures
0.04, 0.6 and 3.6 s. Loading the decoder comes on top of the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from fluxonnx.runtime.canvas import Canvas
from fluxonnx.runtime.images import sample_to_image

# How the preview of a step can be drawn: by the decoder, or by `FastPreview`.
METHODS = ("fast", "vae")

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


class FastPreview:
    """Draws small pictures by a linear map from each latent pixel to the mean colour of its part of the picture.

    The map is fitted by least squares at the first use, to a picture of plain areas that is encoded for it. With the
    bundled demo model, the previews of five prompts are 19.5 to 27.8 dB from the downscaled pictures; those of the
    decoder are 20.0 to 28.6, and a map that is fitted to these pictures themselves gives 21.1 to 27.0.

    No build stores a map. Fitting one, loading the encoder included, takes 0.64 of the time of decoding a picture of
    256x256 (measured side by side at the sizes of the 4B model's autoencoder), once for a model that is open. A stored
    one would have to be made by running the encoder in the export, which runs no graph, and follow its every change.
    """

    def __init__(self, encode: Callable[[list[np.ndarray]], list[np.ndarray]], unit: int) -> None:
        """Fit nothing yet.

        Args:
            encode: f32 [1, 3, height, width] in [-1, 1] each -> latents f32 [1, channels, rows, columns].
            unit: Pixels along each side of a latent token.
        """
        self._encode, self._unit = encode, unit
        self._colours: np.ndarray | None = None  # f32 [latent channels + 1, 3]; the last row is added

    def draw(self, latents: np.ndarray) -> Image.Image:
        """Return a small version of a picture, given its latents, f32 [1, channels, rows, columns]."""
        if self._colours is None:
            self._colours = self._fitted()
        pixels = _latent_pixels(latents) @ self._colours[:-1] + self._colours[-1]
        image = sample_to_image(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        height, width = (side * self._unit for side in latents.shape[2:])
        factor = preview_factor(width, height)
        return image.resize((math.ceil(width / factor), math.ceil(height / factor)), Image.Resampling.BICUBIC)

    def _fitted(self) -> np.ndarray:
        sample = _areas(16 * self._unit)
        pixels = _latent_pixels(self._encode([sample])[0])
        features = np.concatenate([pixels, np.ones_like(pixels[..., :1])], axis=-1).reshape(-1, pixels.shape[-1] + 1)
        side = self._unit // 2
        rows, columns = (length // side for length in sample.shape[2:])
        colours = sample[0].reshape(3, rows, side, columns, side).mean((2, 4)).reshape(3, -1).T
        # A little weight on small factors: latents have directions in which this picture hardly varies.
        weight = 1e-3 * len(features) * np.eye(features.shape[1])
        return np.linalg.solve(features.T @ features + weight, features.T @ colours).astype(np.float32)


def put_back(preview: Image.Image, canvas: Canvas | None) -> Image.Image:
    """Show what a preview is a part of, if a part of a picture is drawn."""
    if canvas is None:
        return preview
    whole = canvas.finish(preview.resize(canvas.size, Image.Resampling.BICUBIC))
    factor = preview_factor(*whole.size)
    return whole.resize((math.ceil(whole.width / factor), math.ceil(whole.height / factor)), Image.Resampling.BOX)


def _areas(side: int) -> np.ndarray:
    """Return a picture of plain areas of random colours, coarser and finer ones: f32 [1, 3, side, side] in [-1, 1]."""
    random, half = np.random.default_rng(0), side // 2
    quarters = []
    for cells in (2, 2, 4, 8):
        colours = random.integers(0, 256, (cells, cells, 3), np.uint8)
        quarters.append(colours.repeat(half // cells, 0).repeat(half // cells, 1))
    picture = np.concatenate([np.concatenate(quarters[:2], 1), np.concatenate(quarters[2:], 1)])
    return np.ascontiguousarray((picture / np.float32(127.5) - 1).transpose(2, 0, 1)[None], np.float32)


def _latent_pixels(latents: np.ndarray) -> np.ndarray:
    """f32 [1, 4 * latent channels, rows, columns] -> [2 * rows, 2 * columns, latent channels]; see `shrink`."""
    _, channels, rows, columns = latents.shape
    tokens = latents.reshape(channels // 4, 2, 2, rows, columns)
    return tokens.transpose(3, 1, 4, 2, 0).reshape(2 * rows, 2 * columns, channels // 4)


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
