"""Linear layers, and how the columns that they return lie.

Columns may lie in runs: the first few of all rows, then the next few of all rows, as if each run was a batch of its
own, [runs * batch, seq, columns / runs]. That is how a precision returns them whose weights lie so, and to put them
side by side takes time. What works on numbers, rows or heads does not see the difference, and a linear layer takes
either: it knows how many columns it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from fluxonnx.export import ops

if TYPE_CHECKING:
    from fluxonnx.export.graph import Dim, GraphBuilder


def linear(
    g: GraphBuilder, x: str | Sequence[str], name: str, n_in: int | Sequence[int], n_out: int, bias: bool = False
) -> str:
    """Apply the checkpoint's linear layer `name`.

    Args:
        g: The graph.
        x: [batch, seq, n_in] or [batch, n_in], or several such values side by side; columns may lie in runs.
        name: The layer.
        n_in: How many columns that is, or each of several values has.
        n_out: Columns of the result.
        bias: Whether the layer has one.

    Returns:
        [batch, seq, n_out] or [batch, n_out], columns side by side.
    """
    xs = [x] if isinstance(x, str) else x
    columns = [n_in] if isinstance(n_in, int) else n_in
    with g.scope(name):
        tensor = g.tensor("weight", (n_out, sum(columns)))
        added = g.weight("bias", n_out) if bias else None
        rows = [_rows(g, *pair) for pair in zip(xs, columns, strict=True)]
        products = g.target.precision.linear(g, rows, tensor, added, [n_out], _unit(g, xs[0], 1))
        return _sequence(g, _transposed(g, products[0]), xs[0], columns[0], n_out, 1)


def linear_parts(
    g: GraphBuilder, x: str | Sequence[str], name: str, n_in: int, sizes: Sequence[int], unit: int = 1
) -> list[str]:
    """Apply a linear layer as `linear` does, and return its columns as values of the given sizes.

    Args:
        g: The graph.
        x: [batch, seq, n_in] or [batch, n_in]; or one such value for each of the results.
        name: The layer.
        n_in: How many columns that is.
        sizes: Columns of each result.
        unit: How many columns have to stay side by side.

    Returns:
        [batch, seq, size] or [batch, size] for each size, maybe in runs of columns.
    """
    xs = [x] * len(sizes) if isinstance(x, str) else x
    with g.scope(name):
        tensor = g.tensor("weight", (sum(sizes), n_in))
        of_each_input = groupby(zip(xs, sizes, strict=True), itemgetter(0))
        groups = [(value, [size for _, size in group]) for value, group in of_each_input]
        parts = [tensor] if len(groups) == 1 else tensor.split([sum(group) for _, group in groups])
        results = []
        for part, (value, group) in zip(parts, groups, strict=True):
            rows = [_rows(g, value, n_in)]
            products = g.target.precision.linear(g, rows, part, None, group, _unit(g, value, unit))
            pairs = zip(products, group, strict=True)
            results += [_sequence(g, product, value, n_in, size, _runs(g, product)) for product, size in pairs]
        return results


def pieces(g: GraphBuilder, size: int) -> list[int]:
    """Return the sizes of the values, side by side, as which `ops.swiglu` best takes gates of `size` columns."""
    return g.target.precision.pieces(size)


def alike(g: GraphBuilder, columns: int, *values: str) -> list[str]:
    """Return values of so many columns in the same number of runs: as they are, or side by side."""
    if len({g.width(value) for value in values}) == 1:
        return list(values)
    rows = [_transposed(g, _rows(g, value, columns)) for value in values]
    return [_sequence(g, row, value, columns, columns, 1) for row, value in zip(rows, values, strict=True)]


def side_by_side(g: GraphBuilder, xs: Sequence[str]) -> str:
    """[rows, n] or [runs, rows, n] each -> [rows, all columns]."""
    plain = []
    for x in xs:
        size = g.width(x) * _runs(g, x)
        value = _transposed(g, x)
        plain.append(value if value == x else g.op("Reshape", value, g.constant([-1, size], np.int64)))
    return ops.concat(g, *plain, axis=-1)


def _unit(g: GraphBuilder, x: str, unit: int) -> int | None:
    """Return of how many columns runs have to be multiples; None for one row for each of a batch, which needs none."""
    return unit if len(g.shape(x)) == 3 else None


def _runs(g: GraphBuilder, rows: str) -> int:
    """Return in how many runs the columns of [rows, n] or [runs, rows, n] lie."""
    runs = g.shape(rows)[0] if len(g.shape(rows)) == 3 else 1
    assert isinstance(runs, int)
    return runs


def _rows(g: GraphBuilder, x: str, columns: int) -> str:
    """[runs * batch, seq, columns / runs] -> [runs, rows, columns / runs], or [rows, columns] if it is one run."""
    if len(g.shape(x)) == 2:
        return x
    width = g.width(x)
    shape = [-1, width] if width == columns else [columns // width, -1, width]
    return g.once(("rows", x, columns), lambda: g.op("Reshape", x, g.constant(shape, np.int64)))


def _transposed(g: GraphBuilder, rows: str) -> str:
    """[runs, rows, n] -> [rows, runs, n]; what is one run is returned as it is."""
    return rows if len(g.shape(rows)) == 2 else g.op("Transpose", rows, perm=[1, 0, 2])


def _sequence(g: GraphBuilder, product: str, x: str, n_in: int, size: int, runs: int) -> str:
    """Give a product of `size` columns the batch and the sequence of the `x` it was made of, which has `n_in`."""
    if len(g.shape(x)) == 2:
        return product
    batch, seq, width = g.shape(x)[0], g.shape(x)[1], size // runs

    def target() -> str:
        with g.outside():  # all layers share it
            return g.op(
                "Concat", g.constant([-1], np.int64), ops.size_of(g, x, 1), g.constant([width], np.int64), axis=0
            )

    shape = target() if seq is None else g.once(("sequence", seq, width), target)
    batch = _divided(batch, n_in // g.width(x))
    return g.op("Reshape", product, shape, shape=[_times(batch, runs), seq, width])


def _times(size: Dim, runs: int) -> Dim:
    if isinstance(size, int):
        return runs * size
    return f"{runs} * {size}" if size and runs > 1 else size


def _divided(size: Dim, runs: int) -> Dim:
    if isinstance(size, int):
        return size // runs
    return size.removeprefix(f"{runs} * ") if size else size
