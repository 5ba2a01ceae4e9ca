"""Pictures in bands of rows, so that few values as large as the picture are in memory at once.

A picture is a list of bands [batch, channels, rows, width] of equally many rows, from top to bottom: a single one where
it is whole. Each operation reads what it needs of the neighbouring bands, and norms first gather the statistics of all
of them. So the result is that of the whole picture, but for the order of sums.

Nodes are added band by band, as they should run: of the values between two operations few are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fluxonnx.contract import BAND_CHANNELS
from fluxonnx.export.ops.builder import ModelBuilder
from fluxonnx.export.primitives import add, concat, mul, reshape

Picture = list[str]

# Pictures of fewer bands, and of models with fewer than BAND_CHANNELS at full size, take no memory worth saving. A
# graph with bands takes longer to open (4B model, processor time on a busy machine: 0.84 instead of 0.42 s).
LEAST_BANDS = 4
LAST = np.iinfo(np.int64).max


def divided(g: ModelBuilder, x: Picture, scale: int, channels: int) -> Picture:
    """Divide a picture that is whole into bands where that saves memory; else return it.

    Args:
        g: The graph.
        x: The picture.
        scale: Rows of the picture per row of latents, which is the number of bands.
        channels: The most channels of values that are as large as the picture that is decoded or encoded.
    """
    if len(x) > 1 or scale < LEAST_BANDS or channels < BAND_CHANNELS or not g.fused or not g.precision.bands:
        return x
    return _divided(g, x[0], scale)


def gathered(g: ModelBuilder, x: Picture, scale: int) -> Picture:
    """Return a picture that is whole where `scale` bands save no memory; else `x`."""
    return x if scale >= LEAST_BANDS else [whole(g, x)]


def whole(g: ModelBuilder, x: Picture) -> str:
    """Join the bands of a picture."""
    return concat(g, *x, axis=2)


def added(g: ModelBuilder, a: Picture, b: Picture) -> Picture:
    """Return a + b."""
    return [add(g, *pair) for pair in zip(a, b, strict=True)]


def normalised(
    g: ModelBuilder, x: Picture, name: str, weights: tuple[str, str], groups: int, eps: float, after: Picture | None
) -> Callable[[str], str]:
    """Return a function that normalises a part of a picture in bands as `group_norm` does all of it.

    The mean of a picture is that of the bands' means, its variance that of their variances plus that of their means.

    Args:
        g: The graph.
        x: The picture.
        name: The layer.
        weights: Its scale and shift [channels].
        groups: Groups of channels that are normalised together.
        eps: Added to their variance.
        after: A picture of as many bands and channels that is computed before anything is normalised. onnxruntime
            computes a value as late as it can, which would keep what it is made of in memory until then.
    """
    means, variances = [], []
    with g.scope(name):
        for i, band in enumerate(x):
            values = reshape(g, band, [0, groups, -1])
            if after is not None:  # no values, but they wait for the band
                means.append(_places(g, reshape(g, after[i], [0, groups, -1]), 0, 0))
            means.append(g.reduce("ReduceMean", values, [2]))
            centred = g.op("Sub", values, means[-1])
            variances.append(g.reduce("ReduceMean", mul(g, centred, centred), [2]))
        joined = concat(g, *means, axis=2)  # [batch, groups, bands]
        mean = g.reduce("ReduceMean", joined, [2])
        apart = g.op("Sub", joined, mean)
        variance = g.reduce("ReduceMean", add(g, concat(g, *variances, axis=2), mul(g, apart, apart)), [2])
        deviation = g.op("Sqrt", add(g, variance, g.constant(eps)))
        per_group, per_channel = [groups, -1], [-1, g.sizes(weights[0], 1)[0], 1, 1]
        scale = g.op("Div", reshape(g, weights[0], per_group), deviation)
        shift = g.op("Sub", reshape(g, weights[1], per_group), mul(g, mean, scale))
        scale, shift = reshape(g, scale, per_channel), reshape(g, shift, per_channel)

    def normal(part: str) -> str:
        with g.scope(name):
            return add(g, mul(g, part, scale), shift)

    return normal


def with_rims(g: ModelBuilder, x: Picture, above: int, below: int) -> Iterator[tuple[str, int, int]]:
    """Yield each band with rows of its neighbours, and how many rows of padding the picture's own rims need.

    Args:
        g: The graph.
        x: The picture.
        above: Rows of the band above, 0 or 1.
        below: Rows of the band below, 0 or 1.

    Yields:
        The band and what lies beside it, and rows to pad above and below.
    """
    for i, band in enumerate(x):
        first, last = i == 0, i == len(x) - 1
        parts = [band]
        if above and not first:
            parts.insert(0, _places(g, x[i - 1], -1, LAST))
        if below and not last:
            parts.append(_places(g, x[i + 1], 0, 1))
        yield _joined(g, parts), above if first else 0, below if last else 0


def pairs(g: ModelBuilder, x: Sequence[str]) -> Picture:
    """Join each two bands that follow each other."""
    return [_joined(g, x[i : i + 2]) for i in range(0, len(x), 2)]


def halves(g: ModelBuilder, band: str) -> Picture:
    """Divide a band with an even number of rows into two."""
    return _divided(g, band, 2)


def _divided(g: ModelBuilder, x: str, count: int) -> Picture:
    if g.opset >= 18:
        return list(g.op("Split", x, axis=2, outputs=count, num_outputs=count))
    return list(g.op("Split", x, axis=2, outputs=count))


def _places(g: ModelBuilder, x: str, start: int, end: int) -> str:
    """Return a part of the third dimension."""
    return g.op("Slice", x, *(g.constant([n], np.int64) for n in (start, end, 2)))


def _joined(g: ModelBuilder, parts: Sequence[str]) -> str:
    return g.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]
