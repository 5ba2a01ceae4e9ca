"""How a weight is stored and a linear computed, per precision; nothing else in the package knows.

A new precision is a subclass that stores weights its own way, and a line in `PRECISIONS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

from fluxonnx.checkpoint import Tensor

if TYPE_CHECKING:
    from fluxonnx.export.graph import GraphBuilder


class Precision:
    """Weights as the checkpoint stores them (bf16 for the released models), arithmetic in float32.

    Nothing is copied: initializers point into the checkpoint's own files, and the graph casts each weight right
    before it is used.
    """

    name = "bf16"

    def stored_dtype(self, tensor: Tensor) -> str:
        """Return the safetensors dtype under which `tensor` is stored."""
        return tensor.dtype

    def weight(self, g: GraphBuilder, tensor: Tensor) -> str:
        """Return `tensor` as a float32 value."""
        value = g.stored(tensor, self.stored_dtype(tensor))
        if self.stored_dtype(tensor) == "F32":
            return value
        return g.weight_op("Cast", value, to=TensorProto.FLOAT)

    def linear(self, g: GraphBuilder, x: str, tensor: Tensor, bias: str | None) -> str:
        """Multiply the rows of `x` [rows, in] by `tensor` [out, in] as the checkpoint has it, and add `bias` [out]."""
        weight = self.weight(g, tensor)
        return g.op("Gemm", x, weight, *([bias] if bias else []), transB=1)

    def embedding(self, g: GraphBuilder, ids: str, tensor: Tensor) -> str:
        """Look rows of `tensor` [entries, dim] up by int64 `ids`, as float32; only the rows are cast, not the table."""
        rows = g.op("Gather", g.stored(tensor, self.stored_dtype(tensor)), ids, axis=0)
        if self.stored_dtype(tensor) == "F32":
            return rows
        return g.op("Cast", rows, to=TensorProto.FLOAT)


class Float32(Precision):
    """Weights converted to float32, in a file of their own: twice the size, no casts."""

    name = "fp32"

    def stored_dtype(self, tensor: Tensor) -> str:
        """Return F32, whatever the checkpoint has."""
        return "F32"


PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in (Precision(), Float32())}
