"""Convolutions as products of matrices, a band of rows at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fluxonnx.openblas.call import Call, Unsupported, operator, whole
from fluxonnx.openblas.ops.linear import floats, product, round_into

# Values of a band's result, about: 8 MB. Smaller bands repeat more rows, and their products are less efficient
# (measured: 512 channels of 64x64 pixels in 407 ms with 1 MB, 330 with 8).
BAND = 1 << 21


@operator("Conv", wide=True)
def conv(call: Call) -> np.ndarray:
    """Convolve pictures [batch, channels, height, width]; other numbers of dimensions on a slower way."""
    x, weight, bias = (whole(call.input(i)) for i in range(3))
    spatial = x.ndim - 2
    kernel = list(weight.shape[2:])
    strides = call.attribute("strides") or [1] * spatial
    dilations = call.attribute("dilations") or [1] * spatial
    groups = call.attribute("group", 1)
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(f"the picture has {x.shape[1]} channels, the kernel takes {weight.shape[1] * groups}")
    extents = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    pads = _pads(call, x.shape[2:], extents, strides)
    sizes = [
        (size + before + after - extent) // stride + 1
        for size, (before, after), extent, stride in zip(x.shape[2:], pads, extents, strides, strict=True)
    ]
    out = call.empty((x.shape[0], weight.shape[0], *sizes), x.dtype)
    if bias is not None:
        bias = floats(bias)
    for i in range(x.shape[0]):
        for group in range(groups):
            channels = slice(group * weight.shape[1], (group + 1) * weight.shape[1])
            made = slice(group * weight.shape[0] // groups, (group + 1) * weight.shape[0] // groups)
            args = (x[i, channels], weight[made], None if bias is None else bias[made], out[i, made])
            if spatial == 2 and kernel == [1, 1] and strides == [1, 1] and not any(map(any, pads)):
                _pixels(call, *args)
            elif spatial == 2 and set(strides) | set(dilations) == {1}:
                _shifted(call, *args, pads)
            else:
                _gathered(call, *args, pads, extents, strides, dilations)
    return out


def _pads(call: Call, sizes: tuple[int, ...], extents: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """Return what is added before and after each axis."""
    auto = call.attribute("auto_pad", b"NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        found = []
        for size, extent, stride in zip(sizes, extents, strides, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + extent - size)
            less, more = total // 2, total - total // 2
            found.append((less, more) if auto == "SAME_UPPER" else (more, less))
        return found
    if auto not in ("NOTSET", "VALID"):
        raise Unsupported(f"Conv has an unknown auto_pad {auto!r}")
    pads = (call.attribute("pads") if auto == "NOTSET" else None) or [0] * (2 * len(sizes))
    return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))


def _pixels(call: Call, x: np.ndarray, weight: np.ndarray, bias: Any, out: np.ndarray) -> None:
    """Convolve with a kernel of one pixel: a product with all pixels."""
    channels = math.prod(x.shape[1:])
    target = call.empty((len(out), channels)) if out.dtype != np.float32 else out.reshape(len(out), channels)
    result = out.reshape(len(out), channels)

    def finish(part: np.ndarray, rows: slice, columns: slice) -> None:
        if bias is not None:
            part += bias[rows, None]
        if out.dtype != np.float32:
            round_into(part, result[rows, columns])

    product(call, floats(weight.reshape(len(out), -1)), x.reshape(len(x), channels), target, finish)


def _bands(call: Call, height: int, columns: int, made: int) -> list[slice]:
    """Divide the rows of a picture into bands, at least as many as threads."""
    rows = max(1, min(BAND // max(1, columns * made), -(-height // call.workers.threads)))
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def _padded(workers: Any, x: np.ndarray, rows: slice, extent: int, pads: list[tuple[int, int]]) -> np.ndarray:
    """Return the rows that a band of the result depends on, with zeros around: [channels, rows + extent - 1, width]."""
    (above, _), (left, right) = pads
    height, width = x.shape[1:]
    count = rows.stop - rows.start + extent - 1
    # One more row: the last places of the kernel read past the end, into columns that are left out.
    room = workers.scratch("padded", (len(x), count + 1, width + left + right))
    first = rows.start - above
    inside = slice(max(0, first), min(height, first + count))
    room[:, : inside.start - first] = 0
    room[:, inside.stop - first :] = 0
    room[:, :, :left] = 0
    room[:, :, left + width :] = 0
    room[:, inside.start - first : inside.stop - first, left : left + width] = x[:, inside]
    return room


def _shifted(
    call: Call, x: np.ndarray, weight: np.ndarray, bias: Any, out: np.ndarray, pads: list[tuple[int, int]]
) -> None:
    """Convolve without stride: for each place of the kernel add the product with the picture shifted by it.

    A shifted picture is the same memory from another place on, if rows are as wide as the padded picture. The columns
    too many at the right of each row are left out at the end.
    """
    made, channels, tall, wide = weight.shape
    columns = x.shape[2] + sum(pads[1])
    places = np.ascontiguousarray(weight.transpose(2, 3, 0, 1), np.float32)
    scratch = call.workers.scratch

    def band(rows: slice) -> None:
        padded = _padded(call.workers, x, rows, tall, pads)
        flat = padded.reshape(channels, -1)
        count = rows.stop - rows.start
        sums = scratch("sums", (made, count * columns))
        for i, (dy, dx) in enumerate(np.ndindex(tall, wide)):
            start = dy * columns + dx
            call.blas.multiply(places[dy, dx], flat[:, start : start + count * columns], sums, add=i > 0)
        result = sums.reshape(made, count, columns)[:, :, : out.shape[2]]
        if out.dtype == np.float32 and bias is not None:
            np.add(result, bias[:, None, None], out=out[:, rows])
        else:
            round_into(result if bias is None else result + bias[:, None, None], out[:, rows])

    call.workers.each(band, _bands(call, out.shape[1], columns, made))


def _gathered(
    call: Call,
    x: np.ndarray,
    weight: np.ndarray,
    bias: Any,
    out: np.ndarray,
    pads: list[tuple[int, int]],
    extents: list[int],
    strides: list[int],
    dilations: list[int],
) -> None:
    """Convolve with strides or dilations, in any number of dimensions: neighbourhoods are laid side by side."""
    made = len(out)
    flat = floats(weight.reshape(made, -1))
    padded = np.pad(x, [(0, 0), *pads]) if any(map(any, pads)) else x
    axes = tuple(range(1, x.ndim))
    windows = sliding_window_view(padded, extents, axis=axes)
    steps = tuple(slice(None, None, stride) for stride in strides)
    windows = windows[(slice(None), *steps, *(slice(None, None, dilation) for dilation in dilations))]
    # [channels, *kernel, *result]
    spatial = len(strides)
    windows = windows.transpose(0, *range(1 + spatial, 1 + 2 * spatial), *axes)

    def band(rows: slice) -> None:
        view = windows[(slice(None),) * (1 + spatial) + (rows,)]
        columns = call.workers.scratch("columns", view.shape)
        columns[...] = view
        sums = call.workers.scratch("sums", (made, math.prod(view.shape[1 + spatial :])))
        call.blas.multiply(flat, columns.reshape(flat.shape[1], -1), sums)
        if bias is not None:
            sums += bias[:, None]
        round_into(sums.reshape(out[:, rows].shape), out[:, rows])

    columns = math.prod(out.shape[2:]) * max(1, flat.shape[1] // made)
    call.workers.each(band, _bands(call, out.shape[1], columns, made))
