"""Linear layers, and feed-forwards made of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

from fluxonnx.export.ops.builder import ModelBuilder
from fluxonnx.export.ops.norm import silu
from fluxonnx.export.panels import (
    Slices,
    in_panels,
    joined_sequence,
    panel_unit,
    rows_of,
    same_layout,
    sequence,
    without_panels,
)
from fluxonnx.export.primitives import concat, mul

# A sequence, or a wide one in slices.
Activations = str | Slices


def embedding(g: ModelBuilder, ids: str, name: str, entries: int, dim: int) -> str:
    """Look up rows of the checkpoint's embedding `name` by int64 `ids`."""
    with g.scope(name):
        return g.precision.embedding(g, ids, g.tensor("weight", (entries, dim), integers=False))


def linear(
    g: ModelBuilder,
    x: Activations | Sequence[Activations],
    name: str,
    n_in: int | Sequence[int],
    n_out: int,
    bias: bool = False,
) -> str:
    """Apply the checkpoint's linear layer `name`.

    Args:
        g: The graph.
        x: [batch, seq, n_in] or [batch, n_in]; or several such values that are read side by side.
        name: The layer.
        n_in: Columns of `x`, or of each of its values.
        n_out: Columns of the result.
        bias: Whether the layer has a bias.

    Returns:
        [batch, seq, n_out] or [batch, n_out].
    """
    inputs = [x] if isinstance(x, (str, Slices)) else x
    widths = [n_in] if isinstance(n_in, int) else n_in
    parts: list[tuple[str, int]] = []
    for value, width in zip(inputs, widths, strict=True):
        if isinstance(value, Slices):
            assert sum(value.widths) == width, name
            parts += zip(value.values, value.widths, strict=True)
        else:
            parts.append((value, width))
    with g.scope(name):
        tensor = g.tensor("weight", (n_out, sum(widths)))
        added = g.weight("bias", n_out) if bias else None
        rows = [rows_of(g, value, width) for value, width in parts]
        first, first_width = parts[0]
        (product,) = g.precision.linear(g, rows, tensor, added, [n_out], panel_unit(g, first, 1))
        return joined_sequence(g, product, first, first_width)


def linear_chunks(g: ModelBuilder, x: str, name: str, n_in: int, size: int, count: int) -> list[str]:
    """Apply a linear layer to [batch, n_in]; returns its columns as `count` values [batch, size]."""
    return _parts(g, [(x, size)] * count, name, n_in)


def head_projections(
    g: ModelBuilder, layers: Sequence[tuple[str, str]], n_in: int, n_out: int, head_dim: int
) -> list[str]:
    """Project several sequences for one attention.

    Args:
        g: The graph.
        layers: Pairs of a sequence [batch, seq, n_in] and the linear layer to apply.
        n_in: Columns of the sequences.
        n_out: Columns of each projection: heads * head_dim.
        head_dim: Size of a head.

    Returns:
        The projections, in one layout: their heads can be split, normalised, joined along the sequence and attended to.
    """
    projections = [_parts(g, [(x, n_out)], name, n_in, head_dim)[0] for x, name in layers]
    return same_layout(g, n_out, *projections)


def qkv_and_gate(
    g: ModelBuilder, q_rows: str, kv_rows: str, name: str, n_in: int, n_out: int, mlp_dim: int, head_dim: int
) -> tuple[str, str, str, Slices, Slices]:
    """Apply a linear layer that projects for attention and for a feed-forward beside it.

    Args:
        g: The graph.
        q_rows: The tokens [batch, seq, n_in] whose result is wanted.
        kv_rows: The tokens [batch, seq, n_in] that they attend to.
        name: The layer.
        n_in: Columns of the tokens.
        n_out: Columns of q, k and v.
        mlp_dim: Columns of the gate and of the value.
        head_dim: Size of a head.

    Returns:
        q, k, v, and gate and value for `swiglu`.
    """
    widths = g.precision.slices(mlp_dim)
    parts = [(q_rows, n_out), (kv_rows, n_out), (kv_rows, n_out), *((q_rows, width) for width in 2 * widths)]
    q, k, v, *halves = _parts(g, parts, name, n_in, head_dim)
    gate, value = _halves(halves, widths)
    return q, k, v, gate, value


def keys_and_values(
    g: ModelBuilder, rows: str, name: str, n_in: int, n_out: int, mlp_dim: int, head_dim: int
) -> tuple[str, str]:
    """Return only k and v of `qkv_and_gate`; the weight is divided as it is there, so that its bytes are the same."""
    with g.scope(name):
        tensor = g.tensor("weight", (3 * n_out + 2 * mlp_dim, n_in))
        _, part, _ = tensor.split([n_out, 2 * n_out, 2 * mlp_dim])
        unit = panel_unit(g, rows, head_dim)
        products = g.precision.linear(g, [rows_of(g, rows, n_in)], part, None, [n_out, n_out], unit)
        k, v = (sequence(g, product, rows, n_in) for product in products)
        return k, v


def kept_heads(g: ModelBuilder, x: str, width: int) -> str:
    """Return keys or values as a graph hands them out: [batch, seq, width]."""
    return without_panels(g, x, width)


def beside_kept(g: ModelBuilder, x: str, kept: str) -> str:
    """Return keys or values, and behind them those that another graph handed out, [batch, kept_seq, width]."""
    return concat(g, x, in_panels(g, kept, g.width(kept) // g.width(x)), axis=1)


def feed_forward(g: ModelBuilder, x: str, projections: Sequence[str], name: str, dim: int, mlp_dim: int) -> str:
    """SwiGLU between linear layers: [batch, seq, dim] -> [batch, seq, dim].

    Args:
        g: The graph.
        x: The tokens.
        projections: The layer that returns gate and value side by side, or one layer for each.
        name: The layer behind.
        dim: Columns of the tokens.
        mlp_dim: Columns of the gate and of the value.
    """
    widths = g.precision.slices(mlp_dim)
    per_layer = widths if len(projections) == 2 else 2 * widths
    halves = [part for layer in projections for part in _parts(g, [(x, width) for width in per_layer], layer, dim)]
    return linear(g, swiglu(g, *_halves(halves, widths)), name, mlp_dim, dim)


def swiglu(g: ModelBuilder, gate: Slices, value: Slices) -> Slices:
    """Return silu(gate) * value."""
    pairs = zip(gate.values, value.values, strict=True)
    return Slices(tuple(mul(g, silu(g, a), b) for a, b in pairs), gate.widths)


def _halves(values: Sequence[str], widths: Sequence[int]) -> tuple[Slices, Slices]:
    count = len(widths)
    return Slices(tuple(values[:count]), tuple(widths)), Slices(tuple(values[count:]), tuple(widths))


def _parts(g: ModelBuilder, parts: Sequence[tuple[str, int]], name: str, n_in: int, unit: int = 1) -> list[str]:
    """Apply a linear layer whose columns are wanted as several values.

    Args:
        g: The graph.
        parts: For each value the input [batch, seq, n_in] or [batch, n_in], and its columns.
        name: The layer.
        n_in: Columns of the inputs.
        unit: Number of columns that must stay side by side.

    Returns:
        [batch, seq, size] or [batch, size] for each part, possibly in panels.
    """
    with g.scope(name):
        tensor = g.tensor("weight", (sum(size for _, size in parts), n_in))
        groups = [(x, [size for _, size in group]) for x, group in groupby(parts, itemgetter(0))]
        weights = [tensor] if len(groups) == 1 else tensor.split([sum(sizes) for _, sizes in groups])
        results = []
        for weight, (x, sizes) in zip(weights, groups, strict=True):
            products = g.precision.linear(g, [rows_of(g, x, n_in)], weight, None, sizes, panel_unit(g, x, unit))
            results += [sequence(g, product, x, n_in) for product in products]
        return results
