"""Products of float16 that can't overflow, between values that stay float32.

What layers add up (the residual streams of both transformers and the autoencoder, which reach far beyond float16),
what norms, softmax and SiLU are computed from, and a graph's inputs and outputs are float32. Only the two operands of
a product are rounded to float16: of the linears and the attention in the blocks, and of the convolutions. Everything
else is one row per picture, or the first or last layer: its weights are float16 in the file and float32 in use.

diffusers has float16 streams, and clips them to +-65504 (`encoder_hidden_states.clip(-65504, 65504)` at the end of
Flux2TransformerBlock.forward and `hidden_states.clip(-65504, 65504)` in Flux2SingleTransformerBlock.forward,
transformer_flux2.py): infinities are kept away, but what was clipped is wrong. Nothing is clipped here. Activations are
divided by their largest magnitude and multiplied with it after the product, so operands are at most 1; the magnitudes
of the weights of an output add up to at most `quantise.HALF_SUM`. So no product exceeds that, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from fluxonnx.checkpoint import Tensor
from fluxonnx.export import quantise
from fluxonnx.export.graph import Part

if TYPE_CHECKING:
    from fluxonnx.export.graph import GraphBuilder


def stored(g: GraphBuilder, tensor: Tensor) -> tuple[str, str]:
    """Return `tensor` as float16, and what it was divided by to fit: float32 []; what is stored is never a part."""
    if tensor.whole is not None:
        value, scale = stored(g, tensor.whole)
        return g.weight_rows(value, tensor), scale
    g.encoded(tensor, (Part("", "F16", tensor.shape), Part(".scale", "F32", ())), quantise.half)
    return tensor.name, tensor.name + ".scale"


def weight(g: GraphBuilder, tensor: Tensor) -> str:
    """Return a float16 `tensor` as float32."""
    value, scale = stored(g, tensor)
    return g.weight_op("Mul", g.weight_op("Cast", value, to=TensorProto.FLOAT), scale)


def embedding(g: GraphBuilder, ids: str, tensor: Tensor) -> str:
    """Look rows of a float16 `tensor` [entries, dim] up, as float32."""
    table, scale = stored(g, tensor)
    return g.op("Mul", g.cast(g.op("Gather", table, ids, axis=0), TensorProto.FLOAT), scale)


def linear(g: GraphBuilder, x: str, tensor: Tensor, bias: str | None) -> str:
    """Multiply float32 rows [rows, in] by `tensor` [out, in] in float16."""
    return _product(g, x, [-1], tensor, bias, lambda rows, weights: g.op("Gemm", rows, weights, transB=1))


def conv(g: GraphBuilder, x: str, tensor: Tensor, bias: str | None, **attributes: Any) -> str:
    """Convolve float32 [batch, in, height, width] with `tensor` [out, in, height, width] in float16."""
    if bias:
        bias = g.op("Reshape", bias, g.constant([-1, 1, 1], np.int64))
    axes = [1, 2, 3]
    return _product(g, x, axes, tensor, bias, lambda image, weights: g.op("Conv", image, weights, **attributes))


def attention(g: GraphBuilder, q: str, k: str, v: str, attend: Callable[[str, str, str], str]) -> str:
    """Attend in float16 over float32 [batch, seq, heads * head_dim].

    q and k are normalised in the blocks, so their products are small; v comes as it leaves a linear, and is divided by
    its largest magnitude, with which its mixtures are multiplied.
    """
    values, scale = _divided(g, v, [1, 2])
    mixed = attend(g.cast(q, TensorProto.FLOAT16), g.cast(k, TensorProto.FLOAT16), values)
    return g.op("Mul", g.cast(mixed, TensorProto.FLOAT), scale)


def _product(
    g: GraphBuilder, x: str, axes: Sequence[int], tensor: Tensor, bias: str | None, multiply: Callable[[str, str], str]
) -> str:
    operand, scale = g.once(("half", x), lambda: _divided(g, x, axes))
    weights, weight_scale = stored(g, tensor)
    product = g.cast(multiply(operand, weights), TensorProto.FLOAT)
    product = g.op("Mul", product, g.op("Mul", scale, weight_scale))
    return g.op("Add", product, bias) if bias else product


def _divided(g: GraphBuilder, x: str, axes: Sequence[int]) -> tuple[str, str]:
    """Divide float32 `x` by its largest magnitude over `axes`; return float16 of x's shape, and float32 divisors."""
    largest = g.reduce("ReduceMax", g.op("Abs", x), axes)
    scale = g.op("Max", largest, g.constant(float(quantise.TINY)))
    return g.cast(g.op("Div", x, scale), TensorProto.FLOAT16), scale
