"""Products of 8-bit integers: rows of activations are rounded as they come, weights are integers already."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from fluxonnx.checkpoint import Tensor
from fluxonnx.export import linears, ops, quantise
from fluxonnx.export.graph import MICROSOFT, Part

if TYPE_CHECKING:
    from fluxonnx.export.graph import GraphBuilder


def linear(
    g: GraphBuilder,
    xs: Sequence[str],
    tensor: Tensor,
    bias: str | None,
    sizes: Sequence[int],
    unit: int | None,
    levels: int,
    rotation: int,
    paired: bool,
) -> list[str]:
    """Round the rows once for all linears that share them, multiply integers, scale back.

    Args:
        g: The graph.
        xs: Values [rows, n] or [runs, rows, n] that side by side are float32 [rows, in].
        tensor: The weight [out, in]: floats, or integers that are kept.
        bias: What is added, float32 [out].
        sizes: Columns of each of the values that float32 [rows, out] is returned as: each is a product of its own.
        unit: As for `Precision.linear`.
        levels: Steps of the activations on each side of zero.
        rotation: How many inputs are mixed at a time, 0 for none.
        paired: Whether products are added in pairs that must not overflow.
    """
    unsigned = tensor.quantisation is not None and paired
    if rotation:
        xs = g.once(("rotated", rotation, tuple(xs)), lambda: _rotated(g, xs, rotation))
    rows, row_scale = g.once(("int8", levels, tuple(xs)), lambda: _rounded(g, xs, levels))

    runs = [1 if unit is None else size // width_of_runs(size, unit) for size in sizes]
    suffixes = [""] if len(sizes) == 1 else [f".{i}" for i in range(len(sizes))]
    n_in, parts = tensor.shape[1], []
    for suffix, size, count in zip(suffixes, sizes, runs, strict=True):
        width = size // count
        parts += [
            Part(suffix, "U8" if unsigned else "I8", (n_in, size) if count == 1 else (count, n_in, width)),
            Part(f"{suffix}.scale", "F32", (size,) if count == 1 else (count, 1, width)),
        ]
    limit = np.iinfo(np.int16).max // (2 * levels) if paired else None

    def encode(source: Tensor) -> list[np.ndarray]:
        if source.quantisation:
            columns, scales = quantise.given_columns(source, unsigned)
        else:
            columns, scales = quantise.int8_columns(source, limit, rotation)
        ends = np.cumsum(sizes)[:-1]
        pairs = zip(np.split(columns, ends, axis=1), np.split(scales, ends), runs, strict=True)
        return [array for columns, scales, count in pairs for array in _in_runs(columns, scales, count)]

    g.encoded(tensor, parts, encode)
    zero_points = [g.constant(levels, np.uint8), *([g.constant(128, np.uint8)] if unsigned else [])]
    biases = ops.split(g, bias, sizes) if bias else [None] * len(sizes)
    products = []
    for suffix, size, count, added in zip(suffixes, sizes, runs, biases, strict=True):
        weight, scale = tensor.name + suffix, f"{tensor.name}{suffix}.scale"
        if g.target.fused:
            shape = [*([] if count == 1 else [count]), *g.shape(rows)[:-1], size // count]
            inputs = [rows, weight, g.constant(1.0), scale, *zero_points]
            product = g.op("MatMulIntegerToFloat", *inputs, domain=MICROSOFT, like=row_scale, shape=shape)
            product = g.op("Mul", product, row_scale)
        else:
            product = g.op("Cast", g.op("MatMulInteger", rows, weight, *zero_points), to=TensorProto.FLOAT)
            product = g.op("Mul", g.op("Mul", product, row_scale), scale)
        if added and count > 1:
            added = g.op("Reshape", added, g.constant([count, 1, size // count], np.int64))
        products.append(ops.add(g, product, added) if added else product)
    return products


def width_of_runs(size: int, unit: int) -> int:
    """Return how many of `size` columns best lie together, a multiple of `unit`; all if they do not divide.

    onnxruntime multiplies by a matrix for each run, and shares those out among its threads as they get free. Of a
    single matrix each thread gets the same share of the rows, so that all wait for the slowest, and all lay out all of
    the weights. In runs of 256 columns the sums of 768 rows stay in a processor's own cache.
    """
    return next((n for n in RUN_WIDTHS if size % n == 0 and n % unit == 0), size)


def _in_runs(columns: np.ndarray, scales: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut [in, size] and [size] into [count, in, size / count] and [count, 1, size / count], unless `count` is 1."""
    if count == 1:
        return columns, scales
    return columns.reshape(len(columns), count, -1).transpose(1, 0, 2), scales.reshape(count, 1, -1)


def conv(g: GraphBuilder, x: str, tensor: Tensor, bias: str, bands: int, **attributes: Any) -> str:
    """Convolve as `Precision.conv` does, without stride: a product with the neighbourhood of each pixel side by side.

    onnxruntime's own convolutions of integers want to know the range of the result, or are slow with signed weights.
    Other runtimes get a Conv of the weights scaled back.
    """
    n_out, n_in, height, width = tensor.shape
    parts = [Part("", "I8", (height * width * n_in, n_out)), Part(".scale", "F32", (n_out,))]
    g.encoded(tensor, parts, quantise.int8_kernels)
    weight, scale = tensor.name, tensor.name + ".scale"
    if not g.target.fused:
        floats = g.op("Mul", g.op("Cast", weight, to=TensorProto.FLOAT), scale)
        kernels = g.op("Reshape", floats, g.constant([height, width, n_in, n_out], np.int64))
        return g.op("Conv", x, g.op("Transpose", kernels, perm=[3, 2, 0, 1]), bias, **attributes)

    rounded, step, zero = g.op("DynamicQuantizeLinear", x, outputs=3)
    top, left, bottom, right = attributes["pads"]
    pads = g.constant([0, top, left, 0, 0, bottom, right, 0], np.int64)
    padded = g.op("Pad", g.op("Transpose", rounded, perm=[0, 2, 3, 1]), pads, zero)
    band_height = g.op("Div", ops.size_of(g, x, 2), g.constant([bands], np.int64))
    sizes = [ops.size_of(g, x, 0), band_height, ops.size_of(g, x, 3), g.constant([n_out], np.int64)]
    band_shape = g.op("Concat", *sizes, axis=0)
    starts = [g.op("Mul", band_height, g.constant([i], np.int64)) for i in range(bands + 1)]
    rim = g.constant([top + bottom], np.int64)
    products = []
    weights = [weight, *g.aliases(weight, bands - 1)]
    for (start, end), alias in zip(pairwise(starts), weights, strict=True):
        band = ops.rows_from(g, padded, start, g.op("Add", end, rim), "band")
        rows = _neighbourhoods(g, band, height, width)
        inputs = [rows, alias, step, scale, zero, "", bias]
        product = g.op("MatMulIntegerToFloat", *inputs, domain=MICROSOFT, like=step, shape=[None, n_out])
        products.append(g.op("Reshape", product, band_shape, shape=["batch", None, None, n_out]))
    pixels = g.op("Concat", *products, axis=1)
    return g.op("Transpose", pixels, perm=[0, 3, 1, 2])


def _neighbourhoods(g: GraphBuilder, x: str, height: int, width: int) -> str:
    """Lay the `height` x `width` pixels around each of `x` [batch, rows, columns, channels] side by side.

    Returns:
        [batch * rows * columns, height * width * channels]; pixels at the rim have none of their own.
    """
    last, axes = np.iinfo(np.int64).max, g.constant([1, 2], np.int64)
    shifted = []
    for dy, dx in np.ndindex(height, width):
        starts = g.constant([dy, dx], np.int64)
        ends = g.constant([dy - height + 1 or last, dx - width + 1 or last], np.int64)
        shifted.append(g.op("Slice", x, starts, ends, axes))
    columns = height * width * g.width(x)
    return ops.reshape(g, g.op("Concat", *shifted, axis=-1), [-1, columns])


def _rotated(g: GraphBuilder, xs: Sequence[str], group: int) -> list[str]:
    """Multiply values that side by side are [rows, in] by a Hadamard matrix, `group` columns at a time."""
    if any(g.width(x) % group for x in xs):  # a group lies across two of them
        xs = [linears.side_by_side(g, xs)]
    matrix = g.constant(quantise.hadamard(group))
    rotated = []
    for x in xs:
        groups = g.op("Reshape", x, g.constant([-1, group], np.int64))
        shape = g.shape(x)
        back = g.constant([*shape[:-2], -1, shape[-1]], np.int64)
        rotated.append(g.op("Reshape", g.op("MatMul", groups, matrix), back, shape=shape))
    return rotated


def _rounded(g: GraphBuilder, xs: Sequence[str], levels: int) -> tuple[str, str]:
    """Round rows to uint8 around `levels`, the largest value of a row being as many steps away.

    Returns:
        uint8 [rows, in] from 0 to 2 * levels, and the steps, float32 [rows, 1].
    """
    largest = [g.reduce("ReduceMax", g.op("Abs", x), [0, 2] if len(g.shape(x)) == 3 else [1]) for x in xs]
    whole = largest[0] if len(xs) == 1 else g.op("Max", *largest)
    if len(g.shape(whole)) == 3:
        whole = g.op("Reshape", whole, g.constant([-1, 1], np.int64))
    scale = g.op("Max", g.op("Mul", whole, g.constant(1 / levels)), g.constant(float(quantise.TINY)))
    if g.target.fused:
        per_row = g.op("Squeeze", scale, g.constant([-1], np.int64))
        middle = g.op("Expand", g.constant(levels, np.uint8), g.op("Shape", per_row), shape=g.shape(per_row))
        rows = [g.op("QuantizeLinear", x, per_row, middle, axis=len(g.shape(x)) - 2) for x in xs]
    else:
        # QuantizeLinear with a scale per row is more than OpenVINO can do
        steps = [g.op("Round", g.op("Div", x, scale)) for x in xs]
        middle = g.constant(float(levels))
        rows = [g.op("Cast", g.op("Add", step, middle), to=TensorProto.UINT8) for step in steps]
    return linears.side_by_side(g, rows), scale


# Columns of a run, best first. They have to be multiples of most rotations.
RUN_WIDTHS = (256, 192, 128)
