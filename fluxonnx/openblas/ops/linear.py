"""Products of matrices, a panel of columns at a time, each by one thread.

A weight that is not float32 is widened right before its panel is multiplied, into memory that the next panel takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fluxonnx.openblas.call import Call, operator, whole
from fluxonnx.openblas.weights import Wide
from fluxonnx.openblas.workers import Workers

# BLAS copies its left operand into an order of its own once per call, so panels are wide enough for that not to count.
PANEL_COLUMNS = 1024
# Values of a panel, at most: 32 MB.
PANEL_VALUES = 8 << 20
# Multiplications below which one thread is faster than two.
SERIAL = 1 << 17


def panels(workers: Workers, rows: int, inner: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Divide a product into parts of about equal size, as many for each thread: (row, row, column, column)."""
    if rows * inner * columns < SERIAL:
        return [(0, rows, 0, columns)]
    widest = max(64, min(PANEL_COLUMNS, PANEL_VALUES // max(1, inner)))
    count = -(-columns // widest)
    count = -(-count // workers.threads) * workers.threads
    width = -(-columns // count)
    width = -(-width // 16) * 16
    bounds = [(start, min(start + width, columns)) for start in range(0, columns, width)]
    # where there are few columns, rows are divided too
    bands = 1 if len(bounds) >= workers.threads or rows < 64 * workers.threads else workers.threads
    height = -(-rows // bands)
    return [(top, min(top + height, rows), left, right) for left, right in bounds for top in range(0, rows, height)]


def floats(matrix: np.ndarray) -> np.ndarray:
    """Return an array as float32."""
    return matrix if matrix.dtype == np.float32 else matrix.astype(np.float32)


def product(
    call: Call,
    a: np.ndarray,
    b: Any,
    out: np.ndarray,
    finish: Callable[[np.ndarray, slice, slice], None] | None = None,
) -> None:
    """Write a @ b into `out`.

    Args:
        call: The call.
        a: float32 [rows, inner].
        b: [inner, columns]: an array of any dtype that float32 holds, or `Wide`.
        out: float32 [rows, columns].
        finish: finish(part of out, its rows, its columns), called for each part right after it is computed.
    """
    rows, columns = out.shape
    inner = a.shape[1]

    def part(bounds: tuple[int, int, int, int]) -> None:
        top, bottom, left, right = bounds
        target = out[top:bottom, left:right]
        call.blas.multiply(a[top:bottom], _panel(call.workers, b, left, right), target)
        if finish is not None:
            finish(target, slice(top, bottom), slice(left, right))

    if inner == 0:
        out[...] = 0
    call.workers.each(part, panels(call.workers, rows, inner, columns) if out.size and inner else [])


def _panel(workers: Workers, b: Any, left: int, right: int) -> np.ndarray:
    """Return columns of a matrix as float32; what had to be computed lies in this thread's scratch memory."""
    if isinstance(b, Wide):
        if not b.transposed:
            b = b.array()  # rows, not columns, are what can be computed apart
        else:
            panel = workers.scratch("panel", (right - left, b.shape[0]))
            b.fill(left, right, panel)
            return panel.T
    if b.dtype == np.float32:
        return b[:, left:right]
    columns = b[:, left:right]
    if abs(columns.strides[0]) < abs(columns.strides[1]):
        panel = workers.scratch("panel", (right - left, b.shape[0])).T
    else:
        panel = workers.scratch("panel", (b.shape[0], right - left))
    panel[...] = columns
    return panel


@operator("Gemm", wide=True)
def gemm(call: Call) -> np.ndarray:
    """Return alpha * A @ B + beta * C, either operand transposed if so asked."""
    a, b, bias = whole(call.inputs[0]), call.inputs[1], whole(call.input(2))
    alpha, beta = (np.float32(call.attribute(name, 1.0)) for name in ("alpha", "beta"))
    dtype = a.dtype
    if dtype.kind in "iu" or dtype == np.float64:
        return _plain(call, a, whole(b), bias)
    if call.attribute("transA", 0):
        a = a.T
    if call.attribute("transB", 0):
        b = b.transpose()
    elif isinstance(b, Wide) and not b.transposed:
        b = b.array()
    out = call.empty((a.shape[0], b.shape[1]))
    added = None
    if bias is not None and bias.size:
        added = np.broadcast_to(floats(bias) * beta if beta != 1 else floats(bias), out.shape)
    narrow = call.empty(out.shape, dtype) if dtype != np.float32 else None

    def finish(target: np.ndarray, rows: slice, columns: slice) -> None:
        if alpha != 1:
            target *= alpha
        if added is not None:
            target += added[rows, columns]
        if narrow is not None:
            round_into(target, narrow[rows, columns])

    plain = alpha == 1 and added is None and narrow is None
    product(call, floats(a), b, out, None if plain else finish)
    return out if narrow is None else narrow


def round_into(x: np.ndarray, out: np.ndarray) -> None:
    """Round float32 to the dtype of `out`."""
    from fluxonnx.openblas.ops.elementwise import halve

    if out.dtype == np.float16:
        halve(x, out)
    else:
        out[...] = x


def _plain(call: Call, a: np.ndarray, b: np.ndarray, bias: Any) -> np.ndarray:
    """Compute Gemm in the operands' own dtype, which BLAS here does not."""
    a = a.T if call.attribute("transA", 0) else a
    b = b.T if call.attribute("transB", 0) else b
    result = a @ b * call.attribute("alpha", 1.0)
    if bias is not None:
        result = result + bias * call.attribute("beta", 1.0)
    return result.astype(a.dtype)


@operator("MatMul", wide=True)
def matmul(call: Call) -> np.ndarray:
    """Multiply matrices, or stacks of them."""
    a, b = whole(call.inputs[0]), call.inputs[1]
    if isinstance(b, Wide) and b.ndim != 2:
        b = b.array()
    dtype = a.dtype
    if dtype.kind in "iu" or dtype == np.float64:
        return np.matmul(a, whole(b))
    one, other = a.ndim == 1, b.ndim == 1
    a = a[None] if one else a
    b = b[:, None] if other else b
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matrices of {a.shape} and {b.shape} can't be multiplied")
    if b.ndim == 2:
        rows = a.reshape(-1, a.shape[-1])
        out = call.empty((len(rows), b.shape[1]))
        product(call, floats(rows), b, out)
        out = out.reshape(*a.shape[:-1], b.shape[-1])
    else:
        out = _stacks(call, a, b)
    if dtype != np.float32:
        narrow = np.empty(out.shape, dtype)
        round_into(out, narrow)
        out = narrow
    if one:
        out = out[..., 0, :]
    return out[..., 0] if other else out


def _stacks(call: Call, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply stacks of matrices, a band of rows of one at a time."""
    stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = np.broadcast_to(a, (*stack, *a.shape[-2:])), np.broadcast_to(b, (*stack, *b.shape[-2:]))
    out = call.empty((*stack, a.shape[-2], b.shape[-1]))
    if a.shape[-1] == 0 or out.size == 0:
        out[...] = 0
        return out
    height = out.shape[-2]
    if math.prod(stack) < call.workers.threads and out.size * a.shape[-1] > SERIAL:
        height = -(-height // call.workers.threads)
    tasks = [(*place, top) for place in np.ndindex(*stack) for top in range(0, out.shape[-2], height)]

    def band(task: tuple[int, ...]) -> None:
        place, rows = task[:-1], slice(task[-1], task[-1] + height)
        call.blas.multiply(floats(a[place][rows]), floats(b[place]), out[place][rows])

    call.workers.each(band, tasks)
    return out
