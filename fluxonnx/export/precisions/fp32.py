"""Weights converted to float32."""

from __future__ import annotations

from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.export.precisions.bf16 import Precision


class Float32(Precision):
    """Weights converted to float32, in a file of the build: twice the size, no casts."""

    name = "fp32"
    converts = True
    integers_as = "F32"

    def stored_dtype(self, tensor: Tensor) -> str:
        """Return F32, whatever the checkpoint has."""
        return "F32"

    def cuts(self, tensor: Tensor) -> bool:
        """Return True: the file holds whole tensors."""
        return True
