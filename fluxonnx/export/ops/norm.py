"""Norms, modulation and activations."""

from __future__ import annotations

import numpy as np

from fluxonnx.export.graph import MICROSOFT, GraphBuilder
from fluxonnx.export.ops.builder import ModelBuilder
from fluxonnx.export.primitives import add, mul


def silu(g: GraphBuilder, x: str) -> str:
    """Return x * sigmoid(x)."""
    if g.fused:
        return g.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0, like=x)
    return g.op("Mul", x, g.op("Sigmoid", x))


def rms_norm(g: ModelBuilder, x: str, name: str, dim: int, eps: float) -> str:
    """Divide by the root mean square over the last dimension and scale by the weight `name`."""
    with g.scope(name):
        weight = g.weight("weight", dim)
        if g.fused and g.opset >= 23:
            return g.op("RMSNormalization", x, weight, axis=-1, epsilon=eps)
        mean = g.reduce("ReduceMean", g.op("Mul", x, x), [-1])
        rms = g.op("Sqrt", g.op("Add", mean, g.constant(eps)))
        return g.op("Mul", g.op("Div", x, rms), weight)


def layer_norm(g: GraphBuilder, x: str, dim: int, eps: float) -> str:
    """Normalise the last dimension to zero mean and unit variance, without a learned scale."""
    return g.op("LayerNormalization", x, g.constant(np.ones(dim)), axis=-1, epsilon=eps)


def ones_beside(g: ModelBuilder, name: str, n_in: int, size: int, count: int) -> list[np.ndarray]:
    """Return ones to add to each of `count` parts of the outputs of linear layer `name`, scaled as its rows are.

    Each is float32 [] or [size].
    """
    one = np.ones((), np.float32)
    with g.scope(name):
        scaling = g.tensor("weight", (size * count, n_in)).scaling
    if scaling is None or scaling.rows is None:
        return [one] * count
    return [rows if (rows != 1).any() else one for rows in np.split(scaling.rows, count)]


def modulate(g: GraphBuilder, x: str, scale: str, shift: str, one: np.ndarray | float = 1.0) -> str:
    """Return (one + scale) * x + shift; scale and shift are [batch, 1, dim], one is [] or [dim]."""
    return add(g, mul(g, add(g, scale, g.constant(one)), x), shift)
