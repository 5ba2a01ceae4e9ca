"""Sinusoids: timestep features and rotary tables, from the integers and the sigma that define them.

A graph of its own because a runtime that computes in bf16 or fp16 turns `cos(1000 * t * f)` into noise; it has no
weights and costs nothing.
"""

from __future__ import annotations

import numpy as np

from fluxonnx.contract import TransformerConfig
from fluxonnx.export.graph import GraphBuilder
from fluxonnx.ports import Ports

# Positions have two digits of this base, so they end below its square.
POSITION_BASE = 64


def build(g: GraphBuilder, config: TransformerConfig, ports: Ports) -> None:
    """Add the conditioning graph to `g`."""
    timestep, txt_ids, img_ids = (g.input(port) for port in ports.inputs)
    timestep_proj, cos, sin = ports.outputs
    g.output(timestep_proj, timestep_projection(g, timestep, config.timestep_channels))
    with g.scope("pos_embed"):
        tables = rotary_tables(g, g.op("Concat", txt_ids, img_ids, axis=0), config)
    for port, table in zip((cos, sin), tables, strict=True):
        g.output(port, table)


def timestep_projection(g: GraphBuilder, timestep: str, features: int) -> str:
    """[batch] in [0, 1] -> [batch, features], cosines first (get_timestep_embedding, diffusers embeddings.py)."""
    with g.scope("time_guidance_embed"), g.scope("time_proj"):
        half = features // 2
        # float32 throughout, as in the reference: the rounding of 1000 * t * f is part of what the model learned.
        exponent = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
        scaled = g.op("Mul", timestep, g.constant(1000.0))
        column = g.op("Unsqueeze", scaled, g.constant([1], np.int64))
        # ... except this table, where float64 comes closest to torch's float32 exp
        angles = g.op("Mul", column, g.constant(np.exp(exponent.astype(np.float64))))
        return g.op("Concat", g.op("Cos", angles), g.op("Sin", angles), axis=1)


def rotary_tables(g: GraphBuilder, ids: str, config: TransformerConfig) -> tuple[str, str]:
    """Int64 [seq, 4] -> cos and sin f32 [seq, head_dim], every value twice in a row.

    The reference multiplies positions and frequencies in float64 (Flux2PosEmbed, diffusers transformer_flux2.py), and
    few runtimes have cosines of doubles. So positions are split in two digits, whose cosines and sines are constants,
    and the angle sum is formed from those: exact to float32, with no arithmetic on angles at all.
    """
    base = g.constant(POSITION_BASE, np.int64)
    digits = g.op("Div", ids, base), g.op("Mod", ids, base)
    cosines, sines = [], []
    for axis, dim in enumerate(config.axes_dims):
        frequency = 1.0 / config.rope_theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        (cos_high, sin_high), (cos_low, sin_low) = (
            _digit(g, g.op("Gather", digit, g.constant(axis, np.int64), axis=1), weight * frequency)
            for digit, weight in zip(digits, (POSITION_BASE, 1), strict=True)
        )
        cosines.append(g.op("Sub", g.op("Mul", cos_high, cos_low), g.op("Mul", sin_high, sin_low)))
        sines.append(g.op("Add", g.op("Mul", sin_high, cos_low), g.op("Mul", cos_high, sin_low)))
    cos, sin = (_twice(g, g.op("Concat", *parts, axis=1), config.head_dim) for parts in (cosines, sines))
    return cos, sin


def _digit(g: GraphBuilder, digit: str, frequency: np.ndarray) -> tuple[str, str]:
    """Look cosine and sine of digit * frequency up: int64 [seq] -> f32 [seq, len(frequency)] each."""
    angles = np.arange(POSITION_BASE)[:, None] * frequency
    return g.op("Gather", g.constant(np.cos(angles)), digit, axis=0), g.op(
        "Gather", g.constant(np.sin(angles)), digit, axis=0
    )


def _twice(g: GraphBuilder, x: str, width: int) -> str:
    """[seq, width / 2] -> [seq, width], every value twice in a row."""
    column = g.op("Unsqueeze", x, g.constant([2], np.int64))
    return g.op("Reshape", g.op("Concat", column, column, axis=2), g.constant([0, width], np.int64))
