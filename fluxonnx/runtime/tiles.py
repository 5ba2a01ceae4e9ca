"""A picture in overlapping tiles: less memory than in one piece, for a small error.

The autoencoder's norms and its attention use their whole input, so a tile is not exactly what that part of the whole
picture would be. Tiles overlap and fade into each other, as in AutoencoderKL.tiled_decode of diffusers. Here they all
have the same size, because a narrow last tile would have different statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fluxonnx.runtime.memory import whole_bytes
from fluxonnx.runtime.notices import warn

# The largest tile in pixels: two of them side by side cover 1024. In smaller ones, the norms average over less
# (measured with a small trained autoencoder at 1024x1024: 37 dB from the whole picture, 32 dB with tiles of 432).
TILE = 576
OVERLAP = 128
# Below this, a tile could share pixels with its neighbours' neighbours.
SMALLEST = 3 * OVERLAP


@dataclass(frozen=True)
class Tiling:
    """How pictures are divided.

    Attributes:
        tile: The largest side of a tile in pixels, at least `SMALLEST`; None for no tiles.
        unit: Pixels along each side of a latent token; tiles consist of whole tokens.
    """

    tile: int | None
    unit: int


def choose_tile(
    sizes: Sequence[tuple[int, int]],
    wanted: int | None,
    low_memory: bool,
    channels: int,
    free: int,
    in_bands: bool = False,
) -> int | None:
    """Return the side of the tiles for the autoencoder; None if no picture needs any.

    Warns if tiles are used only because memory is short.

    Args:
        sizes: Width and height of each picture that is encoded or decoded.
        wanted: The side of the tiles, if the request says so.
        low_memory: Whether large pictures are always divided.
        channels: The most channels that a layer of the autoencoder has at full resolution.
        free: Bytes of free memory.
        in_bands: Whether the autoencoder's graphs compute bands of rows.
    """
    tile = wanted or TILE
    if max(map(max, sizes)) <= tile:
        return None
    if wanted or low_memory:
        return tile
    needed = whole_bytes(max(width * height for width, height in sizes), channels, in_bands)
    if needed <= free:
        return None
    short = f"memory is short ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free)"
    warn(f"{short}: the picture is decoded in tiles, with small differences")
    return tile


def in_tiles(
    run: Callable[[np.ndarray], np.ndarray], values: np.ndarray, tiling: Tiling, n_in: int, n_out: int
) -> np.ndarray:
    """Apply `run` to tiles of `values` and join the results.

    Args:
        run: f32 [1, channels, h * n_in, w * n_in] -> f32 [1, others, h * n_out, w * n_out].
        values: An input of `run` of any height and width.
        tiling: How large tiles may be.
        n_in: Values of the input along a side of a latent token.
        n_out: Likewise of the output.

    Returns:
        `run(values)`: exactly where one tile is enough, else up to the error of tiles.
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
    """Divide a side into as few spans as possible, all of the same size.

    Returns:
        For each span its start, its size, and the weights of its results, f32 [size * n_out]. Weights fade linearly
        where spans overlap, so that the weights of any result add up to 1.
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
