"""4-bit weights in blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto

from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.errors import UsageError
from fluxonnx.export import primitives
from fluxonnx.export.graph import MICROSOFT, GraphBuilder
from fluxonnx.export.initializers import Part
from fluxonnx.export.precisions import rounding
from fluxonnx.export.precisions.quantised import Quantised

BLOCK_SIZES = (32, 64, 128)


class Int4(Quantised):
    """4-bit weights with a scale for each block of a row; embeddings are 8-bit rows with a scale each."""

    name = "int4"
    rounds_activations = False
    bits = 4
    most_error = 0.2

    def __init__(self, keep: str | None = None, block: int = 64) -> None:
        """Choose the layers that are not quantised, and the number of weights that share a scale: 32, 64 or 128.

        Raises:
            UsageError: `block` is another number, or `keep` is not a regular expression.
        """
        super().__init__(keep)
        if block not in BLOCK_SIZES:
            raise UsageError(f"--block {block} is out of range: choose one of {', '.join(map(str, BLOCK_SIZES))}")
        self.block = block

    def settings(self) -> dict[str, str]:
        """Return the layers that are kept, and the size of a block."""
        return {**super().settings(), "block": str(self.block)}

    def lowest_opset(self, flavour: str) -> int:
        """Return 21 for portable graphs: int4, and DequantizeLinear by blocks."""
        return 17 if flavour == "ort" else 21

    def quantises(self, tensor: Tensor) -> bool:
        """Whether the linear with this weight is quantised: its rows must consist of whole blocks."""
        return super().quantises(tensor) and tensor.shape[1] % self.block == 0

    def error(self, tensor: Tensor, inputs: np.ndarray) -> float:
        """Return the error of a product, as `Quantised.error` does."""
        return rounding.int4_error(tensor, inputs, self.block)

    def product(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str | None) -> str:
        """Multiply by MatMulNBits, or by the weights after DequantizeLinear."""
        if not self.quantises(tensor):
            return super().product(g, x, tensor, bias)
        product = self._blocked(g, x, tensor)
        return g.op("Add", product, bias) if bias else product

    def _blocked(self, g: GraphBuilder, x: str, tensor: Tensor) -> str:
        n_out, n_in = tensor.shape
        block, blocks = self.block, n_in // self.block
        fused = g.fused
        packed = Part("", "U8", (n_out, blocks, block // 2))
        if not fused:
            packed = replace(packed, graph_dtype=TensorProto.INT4, graph_shape=(n_out, n_in))
        parts = (packed, Part(".scale", "F32", (n_out, blocks)))

        def encode(source: Tensor) -> tuple[np.ndarray, np.ndarray]:
            integers, scales = rounding.int4_blocks(source, block)
            # MatMulNBits takes unsigned integers around 8, ONNX's own int4 is in two's complement
            return rounding.pack_int4(integers, 8 if fused else 0), scales

        g.encoded(tensor, parts, encode)
        weight, scale = tensor.name, tensor.name + ".scale"
        if fused:
            # accuracy_level 4: activations are rounded to int8, block by block (by rows in Arm's own kernels)
            sizes: dict[str, Any] = {"K": n_in, "N": n_out, "bits": 4, "block_size": block, "accuracy_level": 4}
            shape = [*g.shape(x)[:-1], n_out]
            return g.op("MatMulNBits", x, weight, scale, domain=MICROSOFT, like=x, shape=shape, **sizes)
        floats = g.weight_op("DequantizeLinear", weight, scale, axis=1, block_size=block)
        return primitives.product(g, x, floats)

    def embedding(self, g: GraphBuilder, ids: str, tensor: Tensor) -> str:
        """Look rows up and scale them."""
        parts = (Part("", "I8", tensor.shape), Part(".scale", "F32", (tensor.shape[0], 1)))
        g.encoded(tensor, parts, rounding.int8_rows)
        rows = g.op("Cast", g.op("Gather", tensor.name, ids, axis=0), to=TensorProto.FLOAT)
        return g.op("Mul", rows, g.op("Gather", tensor.name + ".scale", ids, axis=0))
