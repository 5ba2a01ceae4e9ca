"""A picture in overlapping tiles: less memory than in one piece, for a small error.

The autoencoder's norms and its attention look at all they get, so a tile is not quite the same part of the whole
picture. Tiles overlap and fade into each other, as in AutoencoderKL.tiled_decode of diffusers, but they are all of one
size: a narrow last tile would have statistics of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# The largest tile in pixels: two of them side by side cover 1024. Smaller ones see less of what the norms average over
# (measured with a small trained autoencoder at 1024x1024: 37 dB from the whole picture, 32 dB with tiles of 432).
TILE = 576
OVERLAP = 128
# Below this, a tile could share pixels with its neighbours' neighbours.
SMALLEST = 3 * OVERLAP

# What the autoencoder needs in one piece: at its widest 4.3 arrays of float32, and its weights and what they are laid
# out as (measured on the 4B model: 1.7 GB at 512x512, 4.7 GB at 1024x1024).
BYTES_PER_VALUE = 18
BYTES_BESIDES = 500_000_000


def whole_bytes(pixels: int, channels: int) -> int:
    """Return about how much memory a picture takes in one piece; `channels` is the most there are per pixel."""
    return BYTES_BESIDES + BYTES_PER_VALUE * channels * pixels


@dataclass(frozen=True)
class Tiling:
    """How pictures are divided.

    Attributes:
        tile: The most that a side of a tile may measure, in pixels, at least `SMALLEST`; None for no tiles.
        unit: Pixels along each side of a latent token: tiles consist of whole ones.
    """

    tile: int | None
    unit: int


def in_tiles(
    run: Callable[[np.ndarray], np.ndarray], values: np.ndarray, tiling: Tiling, n_in: int, n_out: int
) -> np.ndarray:
    """Apply `run` to tiles of `values` and put its results together.

    Args:
        run: f32 [1, channels, h * n_in, w * n_in] -> f32 [1, others, h * n_out, w * n_out].
        values: What `run` takes, of any height and width.
        tiling: How large tiles may be.
        n_in: Along a side of a latent token, values of the input.
        n_out: Likewise of the output.

    Returns:
        What `run(values)` would be but for the tiles; exactly that where one tile is enough.
    """
    rows, columns = (side // n_in for side in values.shape[2:])
    if tiling.tile is None or max(rows, columns) * tiling.unit <= tiling.tile:
        return run(values)
    tile, overlap = tiling.tile // tiling.unit, math.ceil(OVERLAP / tiling.unit)
    whole: np.ndarray | None = None
    for top, height, fade_rows in spans(rows, tile, overlap, n_out):
        for left, width, fade_columns in spans(columns, tile, overlap, n_out):
            box = np.s_[..., top * n_in : (top + height) * n_in, left * n_in : (left + width) * n_in]
            piece = run(np.ascontiguousarray(values[box]))
            if whole is None:
                whole = np.zeros((*piece.shape[:2], rows * n_out, columns * n_out), np.float32)
            box = np.s_[..., top * n_out : (top + height) * n_out, left * n_out : (left + width) * n_out]
            whole[box] += piece * (fade_rows[:, None] * fade_columns)
    assert whole is not None
    return whole


def spans(length: int, tile: int, overlap: int, n_out: int) -> list[tuple[int, int, np.ndarray]]:
    """Divide a side into as few spans as can be, all of the same size.

    Returns:
        Per span its start, its size, and the weight of each of its results, f32 [size * n_out]: what it shares with a
        neighbour fades linearly, so that the weights of any result add up to 1.
    """
    count = max(1, math.ceil((length - overlap) / (tile - overlap)))
    size = math.ceil((length + (count - 1) * overlap) / count)
    starts = [i * (length - size) // max(1, count - 1) for i in range(count)]
    weights = [np.ones(size * n_out, np.float32) for _ in starts]
    for i in range(1, count):
        shared = (starts[i - 1] + size - starts[i]) * n_out
        ramp = ((np.arange(shared) + 0.5) / shared).astype(np.float32)
        weights[i][:shared] = ramp
        weights[i - 1][-shared:] = 1 - ramp
    return [(start, size, weight) for start, weight in zip(starts, weights, strict=True)]
