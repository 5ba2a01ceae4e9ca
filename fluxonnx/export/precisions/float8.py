"""8-bit floats of the checkpoint, cast in the graph right before they are used."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from onnx import TensorProto

from fluxonnx.checkpoint.encoded import Encoded
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.export.graph import GraphBuilder

# The oldest ai.onnx opset whose Cast takes 8-bit floats.
OPSET = 19


def is_castable(g: GraphBuilder, tensor: Tensor) -> bool:
    """Whether a graph can use a tensor's 8-bit floats as they are; runtimes other than onnxruntime know none."""
    if not isinstance(tensor, Encoded) or tensor.float8 is None:
        return False
    return g.fused and g.opset >= OPSET and not tensor.scaling


def cast(g: GraphBuilder, tensor: Tensor) -> str:
    """Return a tensor of 8-bit floats as a float32 value, times its scales."""
    assert isinstance(tensor, Encoded)
    assert tensor.float8 is not None
    dtype, scale = tensor.float8.dtype, tensor.float8.scale
    place = Tensor(tensor.name, dtype, tensor.shape, tensor.file, tensor.offset, tensor.nbytes, tensor.swapped)
    value = g.weight_op("Cast", g.stored(place, dtype, in_place=True), to=TensorProto.FLOAT)
    if scale is None:
        return value
    # parts of a fused layer share the scale for all of it; a scale per row is a part of the file's, too
    name = f"{scale.name}@{scale.offset}"
    scale = replace(scale, name=name)
    factor = g.stored(scale, scale.dtype, in_place=True)
    if scale.dtype != "F32":
        factor = g.weight_op("Cast", factor, to=TensorProto.FLOAT)
    if math.prod(scale.shape) > 1:
        shape = g.constant([-1, *(1 for _ in tensor.shape[1:])], np.int64)
        factor = g.weight_op("Reshape", factor, shape)
    return g.weight_op("Mul", value, factor)
