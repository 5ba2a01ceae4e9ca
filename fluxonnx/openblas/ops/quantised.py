"""Integers: rounding to them, scaling them back, and products of them.

BLAS knows no integers. They are exact in float32, and so are sums of products up to 2**24. Longer sums are made of
such, or rounded where the result is float32 anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fluxonnx.openblas.call import MICROSOFT, Call, Unsupported, operator
from fluxonnx.openblas.ops.elementwise import pointwise
from fluxonnx.openblas.ops.linear import product
from fluxonnx.openblas.weights import Packed, Wide

# Products of two 9-bit differences that surely add up to less than 2**24.
EXACT_INNER = 1 << 8


def _along(value: np.ndarray, x: np.ndarray, axis: int, block: int) -> np.ndarray:
    """Lay scales out so that they broadcast to `x`: one for all, one per entry of an axis, or one per block of it."""
    if block:
        return np.repeat(value, block, axis=axis)[tuple(slice(n) for n in x.shape)]
    if value.size == 1:
        return value.reshape(())
    return value.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


@operator("QuantizeLinear")
def quantize_linear(call: Call) -> np.ndarray:
    """Round to integers of 8 or 16 bits: x / scale + zero point, to nearest even, saturated."""
    x, scale, zero = call.inputs[0], call.inputs[1], call.input(2)
    kind = call.attribute("output_dtype", 0)
    if kind and zero is None:
        from onnx import helper

        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    else:
        dtype = np.dtype(np.uint8) if zero is None else zero.dtype
    if dtype.kind not in "iu" or x.dtype != np.float32:
        raise Unsupported(f"QuantizeLinear from {x.dtype} to {dtype} is not supported")
    axis, block = call.attribute("axis", 1), call.attribute("block_size", 0)
    steps = _along(scale, x, axis, block)
    middle = np.float32(0) if zero is None else _along(zero, x, axis, block).astype(np.float32)
    info = np.iinfo(dtype)

    def compute(x: np.ndarray, steps: np.ndarray, middle: np.ndarray, out: np.ndarray) -> None:
        values = np.rint(x / steps)
        values += middle
        np.clip(values, info.min, info.max, out=values)
        out[...] = values.astype(dtype)

    whole = Call(call.node, [x, steps, middle], frozenset(), call.workers, call.blas)
    return pointwise(whole, compute, x, np.asarray(steps), np.asarray(middle), dtype=dtype)


@operator("DequantizeLinear")
def dequantize_linear(call: Call) -> Any:
    """Scale integers: (x - zero point) * scale. A matrix of packed 4-bit weights is scaled where it is used."""
    x, scale, zero = call.inputs[0], call.inputs[1], call.input(2)
    axis, block = call.attribute("axis", 1), call.attribute("block_size", 0)
    if isinstance(x, Packed):
        by_block = block and len(x.shape) == 2 and axis in (1, -1) and x.shape[1] % block == 0
        if by_block and x.shape[1] % 2 == 0 and scale.dtype == np.float32 and zero is None:
            return _blocks(x, scale, block)
        x = x.whole()
    zero = zero.whole() if isinstance(zero, Packed) else zero
    if scale.dtype == np.float64 or x.dtype.name.startswith("float"):
        raise Unsupported(f"DequantizeLinear of {x.dtype} by {scale.dtype} is not supported")
    steps = _along(scale, x, axis, block)
    values = x.astype(np.float32)
    if zero is not None:
        values -= _along(zero, x, axis, block).astype(np.float32)
    return (values * steps.astype(np.float32)).astype(scale.dtype)


def _blocks(x: Packed, scale: np.ndarray, block: int) -> Wide:
    """Return a matrix of 4-bit weights with a scale per block of a row."""

    def fill(start: int, end: int, out: np.ndarray) -> None:
        blocks = out.reshape(end - start, -1, block)
        blocks[...] = x.rows(start, end).reshape(blocks.shape)
        blocks *= scale[start:end, :, None]

    return Wide(x.shape, fill)


@operator("MatMulInteger")
def matmul_integer(call: Call) -> np.ndarray:
    """Multiply matrices of 8-bit integers exactly: int32."""
    a, b = call.inputs[:2]
    a_zero, b_zero = _zero(call.input(2), rows=True), _zero(call.input(3), rows=False)
    rows = (a.astype(np.float32) - a_zero).reshape(-1, a.shape[-1]) if b.ndim == 2 else None
    if rows is None:
        left, right = a.astype(np.float64) - a_zero, b.astype(np.float64) - b_zero
        return np.matmul(left, right).astype(np.int32)
    out = np.zeros((len(rows), b.shape[1]), np.int32)
    sums = call.empty(out.shape)

    def add(part: np.ndarray, rows: slice, columns: slice) -> None:
        out[rows, columns] += part.astype(np.int32)

    for start in range(0, rows.shape[1], EXACT_INNER):
        span = slice(start, start + EXACT_INNER)
        product(call, rows[:, span], _shifted(b[span], b_zero), sums, add)
    return out.reshape(*a.shape[:-1], b.shape[1])


def _zero(zero: np.ndarray | None, rows: bool) -> np.ndarray | np.float32:
    """Return zero points as float32 that broadcast to a matrix: one for all, or one per row or column."""
    if zero is None:
        return np.float32(0)
    values = zero.astype(np.float32)
    if values.ndim == 1 and values.size > 1 and rows:
        return values[:, None]
    return values.reshape(()) if values.size == 1 else values


def _shifted(b: np.ndarray, zero: np.ndarray | np.float32) -> Any:
    """Return b - zero as a matrix whose columns are computed where they are used."""
    if not np.any(zero):
        return b
    columns = np.broadcast_to(zero, b.shape).T

    def fill(start: int, end: int, out: np.ndarray) -> None:
        out[...] = b.T[start:end]
        out -= columns[start:end]

    return Wide(b.shape, fill, transposed=True)


@operator("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(call: Call) -> np.ndarray:
    """Multiply matrices of 8-bit integers and scale the result: float32. B may be a stack of matrices.

    Source: onnxruntime, docs/ContribOperators.md.
    """
    a, b, a_scale, b_scale = call.inputs[:4]
    a_zero, b_zero, bias = _zero(call.input(4), rows=True), call.input(5), call.input(6)
    left = a.astype(np.float32)
    left -= a_zero
    stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = call.empty((*stack, a.shape[-2], b.shape[-1]))
    left = np.broadcast_to(left, (*stack, *a.shape[-2:]))
    scale = np.broadcast_to(a_scale * b_scale, (*stack, 1, b.shape[-1]))
    zeros = np.broadcast_to(_zero(b_zero, rows=False), (*stack, 1, b.shape[-1]))
    for place in np.ndindex(*stack):
        matrix = b[place] if b.ndim > 2 else b

        def finish(part: np.ndarray, rows: slice, columns: slice, place: tuple[int, ...] = place) -> None:
            part *= scale[place][:, columns]
            if bias is not None:
                part += bias[columns]

        product(call, left[place], _shifted(matrix, zeros[place]), out[place], finish)
    return out


@operator("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(call: Call) -> np.ndarray:
    """Multiply by a matrix of 4-bit weights [columns, inner] with a scale per block of a column.

    Source: onnxruntime, docs/ContribOperators.md.
    """
    a, packed, scale = call.inputs[:3]
    columns, inner, block = (call.attribute(name) for name in ("N", "K", "block_size"))
    if call.attribute("bits", 4) != 4 or any(call.input(i) is not None for i in (3, 4)) or inner % block:
        raise Unsupported("MatMulNBits only takes 4-bit weights around 8, in whole blocks")
    weights = packed.reshape(columns, inner // 2)
    scales = scale.reshape(columns, inner // block)

    def fill(start: int, end: int, out: np.ndarray) -> None:
        pairs = out.reshape(end - start, inner // 2, 2)
        np.bitwise_and(weights[start:end], 15, out=pairs[..., 0], casting="unsafe")
        np.right_shift(weights[start:end], 4, out=pairs[..., 1], casting="unsafe")
        blocks = out.reshape(end - start, -1, block)
        blocks -= np.float32(8)
        blocks *= scales[start:end, :, None]

    rows = a.reshape(-1, inner)
    out = call.empty((len(rows), columns))
    product(call, rows, Wide((inner, columns), fill, transposed=True), out)
    bias = call.input(5)
    if bias is not None:
        out += bias
    return out.reshape(*a.shape[:-1], columns)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call) -> Any:
    """Round to uint8 with the range that the values have; returns the scale and the zero point, too."""
    x = call.inputs[0]
    lowest, highest = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = np.float32((highest - lowest) / np.float32(255))
    if scale == 0:
        scale = np.float32(1)
    zero = np.uint8(np.clip(np.rint(-lowest / scale), 0, 255))
    out = call.empty(x.shape, np.uint8)

    def piece(index: tuple[slice, ...]) -> None:
        out[index] = np.clip(np.rint(x[index] / scale) + np.float32(zero), 0, 255).astype(np.uint8)

    call.workers.each(piece, call.workers.pieces(x.shape))
    return out, np.asarray(scale), np.asarray(zero)
