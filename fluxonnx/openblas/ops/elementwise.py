"""Operators that compute each value from the values in its place, and reductions.

Large ones are divided into pieces that stay in the caches, and those among threads. A result takes the memory of an
input that dies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from fluxonnx.openblas.call import MICROSOFT, Call, Unsupported, operator
from fluxonnx.openblas.weights import NARROW, Packed, Wide, widened
from fluxonnx.openblas.workers import part

BOOL = np.dtype(np.bool_)
# Weights up to this size are widened when the graph is loaded, larger ones where they are used.
SMALL = 1 << 16


def pointwise(call: Call, compute: Callable[..., Any], *arrays: np.ndarray, dtype: Any = None) -> np.ndarray:
    """Broadcast arrays and compute a result piece by piece.

    Args:
        call: The call, whose first inputs the arrays are.
        compute: compute(*pieces, out=piece of the result).
        *arrays: The operands.
        dtype: Of the result; by default that of the first operand.
    """
    dtype = arrays[0].dtype if dtype is None else np.dtype(dtype)
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    out = call.result(shape, dtype, *range(len(arrays)))

    def piece(index: tuple[slice, ...]) -> None:
        place: Any = (*index, ...)  # of an array without axes, this is an array, too
        compute(*(part(array, index) for array in arrays), out=out[place])

    call.workers.each(piece, call.workers.pieces(shape))
    return out


def _divide(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    if out.dtype.kind in "iu":  # towards zero, as in C
        out[...] = np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)) if out.dtype.kind == "i" else a // b
    else:
        np.divide(a, b, out=out)


def _sigmoid(x: np.ndarray, out: np.ndarray) -> None:
    np.negative(x, out=out)
    np.exp(out, out=out)
    out += out.dtype.type(1)
    np.reciprocal(out, out=out)


UNARY: dict[str, Callable[..., Any]] = {
    "Abs": np.abs,
    "Ceil": np.ceil,
    "Cos": np.cos,
    "Exp": np.exp,
    "Floor": np.floor,
    "Log": np.log,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Reciprocal": np.reciprocal,
    "Round": np.rint,
    "Sigmoid": _sigmoid,
    "Sin": np.sin,
    "Sqrt": np.sqrt,
    "Tanh": np.tanh,
}
BINARY: dict[str, Callable[..., Any]] = {"Add": np.add, "Div": _divide, "Mul": np.multiply, "Sub": np.subtract}
# Results are booleans.
COMPARISONS: dict[str, Callable[..., Any]] = {
    "And": np.logical_and,
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
}


@operator(*UNARY)
def unary(call: Call) -> np.ndarray:
    """Apply a function to each value."""
    return pointwise(call, UNARY[call.node.type], call.inputs[0])


@operator(*BINARY)
def binary(call: Call) -> np.ndarray:
    """Combine two operands."""
    return pointwise(call, BINARY[call.node.type], *call.inputs)


@operator(*COMPARISONS)
def comparison(call: Call) -> np.ndarray:
    """Compare two operands."""
    return pointwise(call, COMPARISONS[call.node.type], *call.inputs, dtype=BOOL)


@operator("Mod")
def mod(call: Call) -> np.ndarray:
    """Return the remainder: with the sign of the divisor, or with `fmod` that of the dividend."""
    return pointwise(call, np.fmod if call.attribute("fmod", 0) else np.mod, *call.inputs)


@operator("Max", "Min")
def extreme(call: Call) -> np.ndarray:
    """Return the largest or smallest of any number of operands."""
    function = np.maximum if call.node.type == "Max" else np.minimum

    def compute(*arrays: np.ndarray, out: np.ndarray) -> None:
        out[...] = reduce(function, arrays)

    return pointwise(call, compute, *call.inputs)


@operator("Where")
def where(call: Call) -> np.ndarray:
    """Choose between two operands."""

    def compute(condition: np.ndarray, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        out[...] = np.where(condition, a, b)

    return pointwise(call, compute, *call.inputs, dtype=call.inputs[1].dtype)


@operator("QuickGelu", domain=MICROSOFT)
def quick_gelu(call: Call) -> np.ndarray:
    """Return x * sigmoid(alpha * x), with alpha = 1 SiLU."""
    alpha = np.float32(call.attribute("alpha", 1.702))

    def compute(x: np.ndarray, out: np.ndarray) -> None:
        gate = call.workers.scratch("gate", x.shape)
        np.multiply(x, -alpha, out=gate)
        np.exp(gate, out=gate)
        gate += np.float32(1)
        np.divide(x, gate, out=out)

    return pointwise(call, compute, call.inputs[0])


@operator("Cast", wide=True)
def cast(call: Call) -> Any:
    """Convert to another dtype; a narrow weight becomes float32 only where it is used."""
    x, to = call.inputs[0], call.attribute("to")
    if to in (TensorProto.UNDEFINED, TensorProto.STRING):
        raise Unsupported(f"casts to {TensorProto.DataType.Name(to)} are not supported")
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(to))
    if isinstance(x, Wide | Packed):
        x = x.whole() if isinstance(x, Packed) else x
        if isinstance(x, Wide):
            if dtype == np.float32:
                return x
            x = x.array()
    if dtype == np.float32 and x.dtype in NARROW and _is_mapped(x) and x.size > SMALL:
        return widened(x)
    if x.dtype == dtype:
        return x[...]

    def compute(x: np.ndarray, out: np.ndarray) -> None:
        if dtype == np.float16 and x.dtype == np.float32:
            halve(x, out)
        else:
            out[...] = x.astype(dtype) if dtype.kind != "b" else x != 0

    return pointwise(call, compute, x, dtype=dtype)


def _is_mapped(x: np.ndarray) -> bool:
    """Whether an array is a constant of a file."""
    base: Any = x
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


def halve(x: np.ndarray, out: np.ndarray) -> None:
    """Round float32 to float16, to nearest even; numpy does it without vector instructions, ten times slower.

    Source: Fabian Giesen, float_to_half_fast3_rtne (public domain), for values that are normal in float16.
    """
    bits = np.ascontiguousarray(x).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    rounded = magnitude + (((magnitude >> np.uint32(13)) & np.uint32(1)) + np.uint32(0xFFF) - np.uint32(112 << 23))
    rounded >>= np.uint32(13)
    # below the smallest normal number, adding 0.5 has the processor round the digits that float16 has
    small = magnitude < np.uint32(113 << 23)
    if small.any():
        values = magnitude[small].view(np.float32) + np.float32(0.5)
        rounded[small] = values.view(np.uint32) - np.uint32(126 << 23)
    large = magnitude >= np.uint32(143 << 23)
    if large.any():
        nan = magnitude[large] > np.uint32(255 << 23)
        rounded[large] = np.where(nan, np.uint32(0x7E00), np.uint32(0x7C00))
    rounded |= (bits >> np.uint32(16)) & np.uint32(0x8000)
    out.view(np.uint16)[...] = rounded


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMax": np.max,
    "ReduceMean": np.mean,
    "ReduceMin": np.min,
    "ReduceSum": np.sum,
}


@operator(*REDUCTIONS)
def reduction(call: Call) -> np.ndarray:
    """Reduce along axes, an input since opset 13 (ReduceSum) or 18, an attribute before."""
    x = call.inputs[0]
    axes = call.numbers(1, "axes")
    if not axes and call.attribute("noop_with_empty_axes", 0):
        return x[...]
    over = tuple(axis % x.ndim for axis in axes) if axes else tuple(range(x.ndim))
    function, keep = REDUCTIONS[call.node.type], bool(call.attribute("keepdims", 1))
    options: dict[str, Any] = {}
    if x.size == 0 and call.node.type in ("ReduceMax", "ReduceMin"):
        return np.full(_reduced(x.shape, over, keep), _neutral(x.dtype, call.node.type), x.dtype)
    if call.node.type in ("ReduceMax", "ReduceMin") and x.dtype == BOOL:
        options["initial"] = call.node.type == "ReduceMin"
    rest = x.ndim - len(over)
    if over != tuple(range(rest, x.ndim)) or not rest:
        return np.asarray(function(x, axis=over, keepdims=keep, **options), x.dtype)
    out = call.empty((*x.shape[:rest], *([1] * len(over))), x.dtype)

    def piece(index: tuple[slice, ...]) -> None:
        out[index[:rest]] = function(x[index], axis=over, keepdims=True, **options)

    call.workers.each(piece, call.workers.pieces(x.shape, keep=len(over)))
    return out if keep else out.reshape(x.shape[:rest])


def _reduced(shape: tuple[int, ...], axes: tuple[int, ...], keep: bool) -> tuple[int, ...]:
    return tuple(1 if i in axes else n for i, n in enumerate(shape) if keep or i not in axes)


def _neutral(dtype: np.dtype, name: str) -> Any:
    """Return what the extreme of nothing is."""
    lowest = name == "ReduceMax"
    if dtype.kind == "b":
        return not lowest
    if dtype.kind in "iu":
        return np.iinfo(dtype).min if lowest else np.iinfo(dtype).max
    info = ml_dtypes.finfo(dtype)
    return -np.inf if lowest else np.inf if info else 0
