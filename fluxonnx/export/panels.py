"""Panels: how the columns of a linear layer's inputs and outputs lie in memory.

A matrix may be stored as panels of neighbouring columns, one panel after the other: [panels, rows, width / panels]. A
precision whose weights are stored in panels returns its products so, because joining them takes time. In a sequence the
panels count as further batch elements, [panels * batch, seq, width / panels]: element-wise operations, norms over a
head and attention do not see the difference. A linear layer knows how many columns it reads, and so takes either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fluxonnx.export import primitives
from fluxonnx.export.graph import Dim, GraphBuilder

# Preferred widths of a panel, best first; multiples of most Hadamard rotations.
PANEL_WIDTHS = (256, 192, 128)


@dataclass(frozen=True)
class Columns:
    """A matrix of `width` columns: [rows, width], or [panels, rows, width / panels] where it lies in panels."""

    value: str
    width: int
    panels: int = 1


@dataclass(frozen=True)
class Slices:
    """Activations too wide for the caches, as sequences side by side; `widths` are their columns."""

    values: tuple[str, ...]
    widths: tuple[int, ...]


def panel_width(size: int, unit: int, widths: Sequence[int] = PANEL_WIDTHS) -> int:
    """Return the best width of the panels of `size` columns, a multiple of `unit`; `size` if none divides it.

    onnxruntime multiplies by one matrix per panel, and its threads take panels as they become free. With a single
    matrix each thread gets an equal share of the rows: all wait for the slowest, and each packs all of the weights. The
    sums of 768 rows in a panel of 256 columns stay in a processor's own cache.
    """
    return next((n for n in widths if size % n == 0 and n % unit == 0), size)


def panel_unit(g: GraphBuilder, x: str, unit: int) -> int | None:
    """Return the unit for `panel_width`; None for no panels: single rows [batch, n] do not gain from them."""
    return unit if len(g.shape(x)) == 3 and g.fused else None


def rows_of(g: GraphBuilder, x: str, width: int) -> Columns:
    """Return a sequence of `width` columns, [panels * batch, seq, width / panels] or [batch, width], as a matrix.

    Portable graphs have no panels, and multiply sequences as they are: [batch, seq, width].
    """
    if len(g.shape(x)) == 2 or not g.fused:
        return Columns(x, width)
    panel = g.width(x)
    panels = width // panel
    shape = [-1, panel] if panels == 1 else [panels, -1, panel]
    value = g.once(("rows", x, width), lambda: g.op("Reshape", x, g.constant(shape, np.int64)))
    return Columns(value, width, panels)


def joined(g: GraphBuilder, xs: Sequence[Columns]) -> str:
    """Return matrices side by side, without panels: [rows, sum of widths]."""
    plain = []
    for x in xs:
        value = _row_major(g, x)
        plain.append(value if x.panels == 1 else g.op("Reshape", value, g.constant([-1, x.width], np.int64)))
    return primitives.concat(g, *plain, axis=-1)


def sequence(g: GraphBuilder, columns: Columns, x: str, x_width: int) -> str:
    """Return a product as a sequence with the batch and length of `x`, which has `x_width` columns; panels stay."""
    return _sequence(g, columns.value, columns.width, columns.panels, x, x_width)


def joined_sequence(g: GraphBuilder, columns: Columns, x: str, x_width: int) -> str:
    """Return a product as `sequence` does, but without panels: [batch, seq, width]."""
    return _sequence(g, _row_major(g, columns), columns.width, 1, x, x_width)


def same_layout(g: GraphBuilder, width: int, *values: str) -> list[str]:
    """Return sequences of `width` columns in the same number of panels: unchanged, or without panels."""
    if len({g.width(value) for value in values}) == 1:
        return list(values)
    rows = [_row_major(g, rows_of(g, value, width)) for value in values]
    return [_sequence(g, row, width, 1, value, width) for row, value in zip(rows, values, strict=True)]


def without_panels(g: GraphBuilder, x: str, width: int) -> str:
    """Return a sequence of `width` columns without panels: [batch, seq, width]."""
    if g.width(x) == width:
        return x
    return _sequence(g, _row_major(g, rows_of(g, x, width)), width, 1, x, width)


def in_panels(g: GraphBuilder, x: str, panels: int) -> str:
    """[batch, seq, width] -> [panels * batch, seq, width / panels]."""
    if panels == 1:
        return x
    width = g.width(x)
    rows = g.op("Reshape", x, g.constant([-1, panels, width // panels], np.int64))
    return _sequence(g, g.op("Transpose", rows, perm=[1, 0, 2]), width, panels, x, width)


def _row_major(g: GraphBuilder, columns: Columns) -> str:
    """[panels, rows, n] -> [rows, panels, n]; a matrix without panels is returned unchanged."""
    return columns.value if columns.panels == 1 else g.op("Transpose", columns.value, perm=[1, 0, 2])


def _sequence(g: GraphBuilder, product: str, width: int, panels: int, x: str, x_width: int) -> str:
    if len(g.shape(x)) == 2 or not g.fused:
        return product
    batch, seq, panel = g.shape(x)[0], g.shape(x)[1], width // panels

    def target() -> str:
        with g.outside():  # shared by all layers
            return g.op(
                "Concat", g.constant([-1], np.int64), primitives.size_of(g, x, 1), g.constant([panel], np.int64), axis=0
            )

    shape = target() if seq is None else g.once(("sequence", seq, panel), target)
    batch = _divided(batch, x_width // g.width(x))
    return g.op("Reshape", product, shape, shape=[_times(batch, panels), seq, panel])


def _times(size: Dim, panels: int) -> Dim:
    if isinstance(size, int):
        return panels * size
    return f"{panels} * {size}" if size and panels > 1 else size


def _divided(size: Dim, panels: int) -> Dim:
    if isinstance(size, int):
        return size // panels
    return size.removeprefix(f"{panels} * ") if size else size
