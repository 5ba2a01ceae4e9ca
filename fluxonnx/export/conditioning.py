"""Sinusoids: timestep features and rotary tables, from the integers and the sigma that define them.

A graph of its own because a runtime that computes in bf16 or fp16 turns `cos(1000 * t * f)` into noise; it has no
weights and costs nothing.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from fluxonnx.export.graph import GraphBuilder
from fluxonnx.export.transformer import TransformerConfig


def build(g: GraphBuilder, config: TransformerConfig) -> None:
    """Add the conditioning graph to `g`.

    Inputs: timestep f32 [batch] in [0, 1]; txt_ids int64 [text_seq, 4]; img_ids int64 [image_seq, 4].
    Outputs: timestep_proj f32 [batch, features]; rotary_cos, rotary_sin f32 [text_seq + image_seq, head_dim].
    """
    timestep = g.input("timestep", TensorProto.FLOAT, ["batch"], "sigma of each picture, in [0, 1]")
    txt_ids = g.input("txt_ids", TensorProto.INT64, ["text_seq", 4], "(t, h, w, l) of each text token: (0, 0, 0, i)")
    img_ids = g.input(
        "img_ids", TensorProto.INT64, ["image_seq", 4], "(t, h, w, l) of each image token, then each reference token"
    )
    features = config.timestep_channels
    g.output("timestep_proj", timestep_projection(g, timestep, features), ["batch", features], "timestep features")
    with g.scope("pos_embed"):
        ids = g.op("Concat", txt_ids, img_ids, axis=0)
        angles = rotary_angles(g, ids, config)
    for name, function in (("rotary_cos", "Cos"), ("rotary_sin", "Sin")):
        with g.scope("pos_embed"):
            # [seq, head_dim / 2] -> [seq, head_dim], every value twice in a row
            value = g.op("Cast", g.op(function, angles), to=TensorProto.FLOAT)
            column = g.op("Unsqueeze", value, g.constant([2], np.int64))
            twice = g.op("Concat", column, column, axis=2)
            table = g.op("Reshape", twice, g.constant([0, config.head_dim], np.int64))
        g.output(name, table, ["text_seq + image_seq", config.head_dim], f"{function.lower()} of the rotary angles")


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


def rotary_angles(g: GraphBuilder, ids: str, config: TransformerConfig) -> str:
    """Int64 [seq, 4] -> float64 [seq, head_dim / 2] (Flux2PosEmbed, diffusers transformer_flux2.py)."""
    position = g.op("Cast", ids, to=TensorProto.DOUBLE)
    angles = []
    for axis, dim in enumerate(config.axes_dims):
        frequency = 1.0 / config.rope_theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        column = g.op("Gather", position, g.constant([axis], np.int64), axis=1)
        angles.append(g.op("Mul", column, g.constant(frequency, np.float64)))
    return g.op("Concat", *angles, axis=1)
