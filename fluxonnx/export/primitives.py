"""The plainest operations on values of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxonnx.export.graph import GraphBuilder


def add(g: GraphBuilder, a: str, b: str) -> str:
    """Return a + b, broadcast."""
    return g.op("Add", a, b)


def mul(g: GraphBuilder, a: str, b: str) -> str:
    """Return a * b, broadcast."""
    return g.op("Mul", a, b)


def magnitude(g: GraphBuilder, x: str) -> str:
    """Return |x|, float32; without Abs in static portable graphs, as CoreML has none in onnxruntime."""
    if g.static and not g.fused:
        return g.op("Max", x, mul(g, x, g.constant(-1.0)))
    return g.op("Abs", x)


def reshape(g: GraphBuilder, x: str, shape: Sequence[int]) -> str:
    """Reshape; 0 keeps a dimension, -1 takes what is left."""
    return g.op("Reshape", x, g.constant(shape, np.int64))


def product(g: GraphBuilder, x: str, weight: str, bias: str | None = None) -> str:
    """Multiply `x` [..., in] by a float `weight` [out, in], and add `bias` [out].

    Other runtimes plan sequences better as they are than flattened to rows, which Gemm asks for.
    """
    if g.fused:
        return g.op("Gemm", x, weight, *([bias] if bias else []), transB=1)
    value = g.op("MatMul", x, g.weight_op("Transpose", weight, perm=[1, 0]))
    return add(g, value, bias) if bias else value


def split(g: GraphBuilder, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
    """Split along `axis` into values of the given sizes; a single one is `x` itself."""
    if len(sizes) == 1:
        return [x]
    return g.op("Split", x, g.constant(sizes, np.int64), axis=axis, outputs=len(sizes))


def concat(g: GraphBuilder, *values: str, axis: int) -> str:
    """Concatenate along `axis`; a single value is returned unchanged."""
    if len(values) == 1:
        return values[0]
    shape = g.shape(values[0])
    sizes = [g.shape(value)[axis] for value in values]
    shape[axis] = sum(sizes) if all(isinstance(n, int) for n in sizes) else " + ".join(str(n) for n in sizes)  # type: ignore[arg-type]
    return g.op("Concat", *values, axis=axis, shape=shape)


def rows_from(g: GraphBuilder, x: str, start: str | int, end: str | int, symbol: str, axis: int = 1) -> str:
    """Return x[start:end] along `axis`; bounds are numbers or int64 [1] values, `symbol` names the new size."""
    size = g.shape(x)[axis]
    if g.static and start == 0 and isinstance(size, int) and end in (size, g.constant([size], np.int64)):
        return x
    bounds = [g.constant([bound], np.int64) if isinstance(bound, int) else bound for bound in (start, end)]
    shape = g.shape(x)
    shape[axis] = symbol
    return g.op("Slice", x, *bounds, g.constant([axis], np.int64), shape=shape)


def size_of(g: GraphBuilder, x: str, axis: int) -> str:
    """Return the size of one dimension as int64 [1]."""
    return g.op("Shape", x, start=axis, end=axis + 1)
