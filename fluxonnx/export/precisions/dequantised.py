"""Weights that the checkpoint has as integers, read as the floats that the integers encode."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np

from fluxonnx.checkpoint.safetensors import DTYPES, ROWS, Tensor
from fluxonnx.export.precisions.rounding import hadamard, rotated


@dataclass(frozen=True)
class Dequantised(Tensor):
    """A quantised tensor whose `dtype` is that of the floats; `offset` and `nbytes` are those of the integers."""

    computed: ClassVar[bool] = True

    def array(self) -> np.ndarray:
        """Compute the weights, [out, in, ...] of `dtype`."""
        weights = np.empty(self.shape, DTYPES[self.dtype])
        for i in range(0, len(weights), ROWS):
            weights[i : i + ROWS] = self.rows(i, i + ROWS)
        return weights

    def rows(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """Compute some rows: integers times scales, multiplied by the matrix of the rotation, which is its own inverse.

        Source: dequantize_int8_simple and dequantize_int8_convrot_weight, comfy_kitchen/backends/eager/quantization.py.
        """
        assert self.quantisation is not None
        integers = Tensor.array(replace(self, dtype="I8"))[start:end]
        scale = self.quantisation.scale.array().astype(np.float32).reshape(-1, *(1 for _ in self.shape[1:]))
        weights = integers.astype(np.float32) * (scale if len(scale) == 1 else scale[start:end])
        group = self.quantisation.rotation
        if group:
            weights = rotated(weights, hadamard(group))
        return weights.astype(DTYPES[self.dtype], copy=False)


def dequantised(tensor: Tensor, dtype: str) -> Tensor:
    """Return a quantised tensor as one of floats, "F32" or "BF16", which are computed when they are read."""
    values = {field.name: getattr(tensor, field.name) for field in fields(tensor)}
    return Dequantised(**{**values, "dtype": dtype})
