"""Estimates of memory, in bytes: functions of sizes and of how much memory is free.

They decide about the size of batches, about tiles, about reading ahead, and about `--precision auto`. All constants
were measured with the 4B model on the CPU.
"""

from __future__ import annotations

# The autoencoder, for a picture in one piece: 4.3 float32 arrays at its widest layer, and a constant for the weights
# and the copies of them that are laid out for the CPU (1.7 GB at 512x512, 4.7 GB at 1024x1024).
BYTES_PER_VALUE = 18
BYTES_BESIDES = 500_000_000

# Likewise in bands of rows (0.72 GB at 512x512, 2.0 to 2.1 GB at 1024x1024).
BAND_BYTES_PER_VALUE = 6.5
BAND_BYTES_BESIDES = 300_000_000

# A single-stream block holds 9 projections of the width of the residual stream, their halves, and copies of the
# residual stream at once, in float32.
BYTES_PER_TOKEN_AND_WIDTH = 4 * 36
# The most pictures in a batch.
MOST_AT_ONCE = 8

# What a run needs besides the transformer's weights, up to 512x512.
WORKING_MEMORY = 1.5e9
# `--precision auto`. Below this size, a transformer's weights cost neither time nor memory worth saving.
SMALL = 500e6


def whole_bytes(pixels: int, channels: int, in_bands: bool = False) -> int:
    """Return what the autoencoder needs for a picture without tiles.

    Args:
        pixels: Width times height.
        channels: The most channels that any of its layers has at full resolution.
        in_bands: Whether its graphs compute bands of rows.
    """
    if in_bands:
        return BAND_BYTES_BESIDES + int(BAND_BYTES_PER_VALUE * channels * pixels)
    return BYTES_BESIDES + BYTES_PER_VALUE * channels * pixels


def batch_size(tokens: int, width: int, free: int, kept: int = 0) -> int:
    """Return how many pictures the transformer can make in one pass: at least one, and half of the memory stays free.

    Args:
        tokens: Tokens per picture: text, picture and references.
        width: Width of the residual stream.
        free: Bytes of free memory.
        kept: Bytes per picture of keys and values that are kept.
    """
    each = tokens * width * BYTES_PER_TOKEN_AND_WIDTH + kept
    return max(1, min(MOST_AT_ONCE, free // 2 // each))


def fits(size: int, free: int) -> bool:
    """Whether `size` bytes of a file can be read into `free` bytes without pushing out pages that are in use."""
    return size <= free
