"""Norms and softmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from fluxonnx.openblas.call import Call, Unsupported, operator
from fluxonnx.openblas.workers import part


def _rows(call: Call) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the input, memory for the result, and how many last axes are normalised."""
    x = call.inputs[0]
    if x.dtype != np.float32 and x.dtype != np.float16:
        raise Unsupported(f"norms of {x.dtype} are not supported")
    axis = call.attribute("axis", -1)
    return x, call.result(x.shape, x.dtype, 0), x.ndim - axis % x.ndim


def _mean(x: np.ndarray, axes: int) -> np.ndarray:
    """Return the mean over the last `axes` axes, which stay with size 1."""
    return x.mean(axis=tuple(range(-axes, 0)), keepdims=True, dtype=np.float32)


def _mean_square(x: np.ndarray, axes: int) -> np.ndarray:
    """Return the mean of squares; without an array of the squares where one axis is normalised."""
    if axes == 1:
        return (np.einsum("...i,...i->...", x, x) / np.float32(x.shape[-1]))[..., None]
    return _mean(x * x, axes)


@operator("RMSNormalization")
def rms_norm(call: Call) -> np.ndarray:
    """Divide by the root mean square and scale."""
    x, out, axes = _rows(call)
    scale, epsilon = call.inputs[1], np.float32(call.attribute("epsilon", 1e-5))

    def piece(index: tuple[slice, ...]) -> None:
        rows = x[index].astype(np.float32, copy=False)
        inverse = 1 / np.sqrt(_mean_square(rows, axes) + epsilon)
        to = out[index]
        if out.dtype == np.float32:
            np.multiply(rows, inverse, out=to)
            to *= part(scale, index)
        else:
            to[...] = rows * inverse * part(scale, index)

    call.workers.each(piece, call.workers.pieces(x.shape, keep=axes))
    return out


@operator("LayerNormalization")
def layer_norm(call: Call) -> Any:
    """Normalise to zero mean and unit variance, scale and shift."""
    x, out, axes = _rows(call)
    scale, bias = call.inputs[1], call.input(2)
    epsilon = np.float32(call.attribute("epsilon", 1e-5))
    if call.attribute("stash_type", 1) != 1:
        raise Unsupported("LayerNormalization is only computed in float32")
    statistics = (*x.shape[: x.ndim - axes], *[1] * axes)
    means, inverses = np.empty(statistics, np.float32), np.empty(statistics, np.float32)

    def piece(index: tuple[slice, ...]) -> None:
        rows = x[index].astype(np.float32, copy=False)
        mean = means[index] = _mean(rows, axes)
        centred = np.subtract(rows, mean, out=out[index] if out.dtype == np.float32 else None)
        inverse = inverses[index] = 1 / np.sqrt(_mean_square(centred, axes) + epsilon)
        centred *= inverse
        centred *= part(scale, index)
        if bias is not None:
            centred += part(bias, index)
        if out.dtype != np.float32:
            out[index] = centred

    call.workers.each(piece, call.workers.pieces(x.shape, keep=axes))
    return (out, means, inverses)[: len(call.node.outputs)] if len(call.node.outputs) > 1 else out


@operator("InstanceNormalization")
def instance_norm(call: Call) -> np.ndarray:
    """Normalise each channel of each picture, scale and shift it.

    A channel can have millions of values. Sums are made of the sums of pieces, in float64.
    """
    x, scale, bias = call.inputs
    if x.dtype != np.float32:
        raise Unsupported(f"norms of {x.dtype} are not supported")
    epsilon = call.attribute("epsilon", 1e-5)
    out = call.result(x.shape, x.dtype, 0)
    flat = np.ascontiguousarray(x).reshape(*x.shape[:2], -1)
    results = out.reshape(flat.shape)
    size = flat.shape[2]
    step = 1 << 15
    spans = [slice(start, start + step) for start in range(0, size, step)]

    def channel(place: tuple[int, int]) -> None:
        values, result = flat[place], results[place]
        mean = np.float32(sum(float(values[span].sum()) for span in spans) / size)
        squares = 0.0
        for span in spans:
            centred = values[span] - mean
            squares += float(np.dot(centred, centred))
        factor = np.float32(scale[place[1]] / np.sqrt(squares / size + epsilon))
        for span in spans:
            to = np.subtract(values[span], mean, out=result[span])
            to *= factor
            to += bias[place[1]]

    call.workers.each(channel, list(np.ndindex(*x.shape[:2])))
    return out


@operator("Softmax")
def softmax(call: Call) -> np.ndarray:
    """Return the softmax along an axis, as since opset 13."""
    x = call.inputs[0]
    axis = call.attribute("axis", -1) % x.ndim
    if axis != x.ndim - 1:
        shifted = np.exp(x - x.max(axis=axis, keepdims=True))
        return shifted / shifted.sum(axis=axis, keepdims=True)
    out = call.result(x.shape, x.dtype, 0)

    def piece(index: tuple[slice, ...]) -> None:
        to = np.subtract(x[index], x[index].max(axis=-1, keepdims=True), out=out[index])
        np.exp(to, out=to)
        to /= to.sum(axis=-1, keepdims=True)

    call.workers.each(piece, call.workers.pieces(x.shape, keep=1))
    return out
