"""Weights converted to float32."""

from __future__ import annotations

from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.export.graph import GraphBuilder
from fluxonnx.export.precisions.bf16 import Precision


class Float32(Precision):
    """Weights converted to float32, in a file of the build: twice the size, no casts."""

    name = "fp32"
    converts = True
    integers_as = "F32"

    def stored_dtype(self, tensor: Tensor) -> str:
        """Return F32, whatever the checkpoint has."""
        return "F32"

    def weight(self, g: GraphBuilder, tensor: Tensor) -> str:
        """Return `tensor` as a float32 value; the file holds whole tensors by the checkpoint's names, no slices."""
        if tensor.whole is not None:
            return g.weight_rows(self.weight(g, tensor.whole), tensor)
        return super().weight(g, tensor)
