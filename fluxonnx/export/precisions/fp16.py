"""Weights converted to float16, and products of float16 that can't overflow, between values that stay float32.

Float32 are: the sums of layers (the residual streams of both transformers and of the autoencoder, which reach far
beyond float16), the inputs of norms, softmax and SiLU, and the inputs and outputs of the graph. Only the two operands
of a product are rounded to float16: in the linears and the attention of the blocks, and in the convolutions. All other
layers compute one row per picture, or are the first or the last: their weights are float16 in the file and float32 in
use.

diffusers has float16 streams, and clips them to +-65504 (`encoder_hidden_states.clip(-65504, 65504)` at the end of
Flux2TransformerBlock.forward and `hidden_states.clip(-65504, 65504)` in Flux2SingleTransformerBlock.forward,
transformer_flux2.py): that avoids infinities, but a clipped value is wrong. Nothing is clipped here. Activations are
divided by their largest magnitude before a product and multiplied by it after, so operands are at most 1. The
magnitudes of the weights of an output add up to at most `rounding.HALF_SUM`. So no product exceeds that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.export import primitives
from fluxonnx.export.graph import GraphBuilder
from fluxonnx.export.initializers import Part
from fluxonnx.export.precisions import rounding
from fluxonnx.export.precisions.bf16 import BLOCKS, NORMS_ON_GPUS, Precision


class Float16(Precision):
    """Weights converted to float16, half the size of float32, and products computed in float16."""

    name = "fp16"
    integers_as = "F32"
    self_contained = True
    sums_kernels = False
    autoencoder_opset = NORMS_ON_GPUS
    bands = False

    def stored_dtype(self, tensor: Tensor) -> str:
        """Return F32: tensors that are not matrices are small, and their errors reach everything."""
        return "F32"

    def weight(self, g: GraphBuilder, tensor: Tensor) -> str:
        """Return `tensor` as a float32 value."""
        return half_weight(g, tensor) if len(tensor.shape) > 1 else super().weight(g, tensor)

    def product(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str | None) -> str:
        """Multiply as `Precision.product` does."""
        if not tensor.name.startswith(BLOCKS):
            if g.static and not g.fused:
                value = g.op("MatMul", x, _turned_weight(g, tensor))
                return g.op("Add", value, bias) if bias else value
            return super().product(g, x, tensor, bias)
        return _product(g, x, [-1], tensor, bias, lambda rows, weights: primitives.product(g, rows, weights))

    def embedding(self, g: GraphBuilder, ids: str, tensor: Tensor) -> str:
        """Look rows up as `Precision.embedding` does."""
        return half_rows(g, ids, tensor)

    def conv(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str, bands: int | None, **attributes: Any) -> str:
        """Convolve as `Precision.conv` does."""
        added = g.op("Reshape", bias, g.constant([-1, 1, 1], np.int64))
        axes = [1, 2, 3]
        return _product(g, x, axes, tensor, added, lambda image, weights: g.op("Conv", image, weights, **attributes))

    def attention(self, g: GraphBuilder, q: str, k: str, v: str, attend: Callable[[str, str, str], str]) -> str:
        """Attend in float16 in the blocks; in the autoencoder nothing bounds the products of q and k.

        q and k are normalised in the blocks, so their products are small. v is the output of a linear: it is divided by
        its largest magnitude, and its mixtures are multiplied by it.
        """
        if not g.path("").startswith(BLOCKS):
            return attend(q, k, v)
        values, scale = _divided(g, v, [1, 2])
        mixed = attend(g.cast(q, TensorProto.FLOAT16), g.cast(k, TensorProto.FLOAT16), values)
        return g.op("Mul", g.cast(mixed, TensorProto.FLOAT), scale)


def half(g: GraphBuilder, tensor: Tensor) -> tuple[str, str]:
    """Return `tensor` as float16 and its divisor, float32 []; the file holds whole tensors, no slices."""
    if tensor.whole is not None:
        value, scale = half(g, tensor.whole)
        return g.weight_rows(value, tensor), scale
    g.encoded(tensor, (Part("", "F16", tensor.shape), Part(".scale", "F32", ())), rounding.half)
    return tensor.name, tensor.name + ".scale"


def half_weight(g: GraphBuilder, tensor: Tensor) -> str:
    """Return `tensor`, stored as float16, as a float32 value."""
    value, scale = half(g, tensor)
    return g.weight_op("Mul", g.weight_op("Cast", value, to=TensorProto.FLOAT), scale)


def _turned_weight(g: GraphBuilder, tensor: Tensor) -> str:
    """Return `half_weight` of a matrix [out, in] as [in, out]: CoreML casts no weight that no node has made."""
    value, scale = half(g, tensor)
    turned = g.weight_op("Cast", g.weight_op("Transpose", value, perm=[1, 0]), to=TensorProto.FLOAT)
    return g.weight_op("Mul", turned, scale)


def half_rows(g: GraphBuilder, ids: str, tensor: Tensor) -> str:
    """Look up rows of `tensor`, stored as float16, by int64 `ids`, as float32."""
    table, scale = half(g, tensor)
    return g.op("Mul", g.cast(g.op("Gather", table, ids, axis=0), TensorProto.FLOAT), scale)


def _product(
    g: GraphBuilder, x: str, axes: Sequence[int], tensor: Tensor, bias: str | None, multiply: Callable[[str, str], str]
) -> str:
    operand, scale = g.once(("half", x), lambda: _divided(g, x, axes))
    weights, weight_scale = half(g, tensor)
    product = g.cast(multiply(operand, weights), TensorProto.FLOAT)
    product = g.op("Mul", product, g.op("Mul", scale, weight_scale))
    return g.op("Add", product, bias) if bias else product


def _divided(g: GraphBuilder, x: str, axes: Sequence[int]) -> tuple[str, str]:
    """Divide float32 `x` by its largest magnitude over `axes`; return float16 of x's shape, and float32 divisors."""
    largest = g.reduce("ReduceMax", primitives.magnitude(g, x), axes)
    scale = g.op("Max", largest, g.constant(float(rounding.TINY)))
    return g.cast(g.op("Div", x, scale), TensorProto.FLOAT16), scale
