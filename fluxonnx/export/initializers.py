"""Initializers whose bytes live outside a graph, and what they are stored as."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper

from fluxonnx.checkpoint.safetensors import DTYPES, Tensor

# Returns one array per `Part` that a tensor is encoded as.
Encode = Callable[[Tensor], Sequence[np.ndarray]]


def onnx_dtype(dtype: str) -> int:
    """Return the ONNX type of a safetensors dtype."""
    return helper.np_dtype_to_tensor_dtype(DTYPES[dtype])


@dataclass(frozen=True)
class Part:
    """One of the arrays that a tensor is encoded as, and its type and shape in the graph where those differ."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    graph_dtype: int | None = None
    graph_shape: tuple[int, ...] | None = None

    @property
    def onnx_dtype(self) -> int:
        """Its type in the graph."""
        return self.graph_dtype or onnx_dtype(self.dtype)

    @property
    def onnx_shape(self) -> tuple[int, ...]:
        """Its shape in the graph."""
        return self.graph_shape or self.shape


@dataclass
class Entry:
    """An initializer, and the entry of a safetensors file that holds its bytes.

    The two differ in shape and type only where safetensors lacks the type (a byte there holds two int4 values).
    `aliases` are further initializers with the same bytes.
    """

    initializer: TensorProto
    dtype: str
    shape: tuple[int, ...]
    aliases: list[TensorProto] = field(default_factory=list)

    @property
    def initializers(self) -> list[TensorProto]:
        """The initializer and its aliases."""
        return [self.initializer, *self.aliases]

    @property
    def nbytes(self) -> int:
        """Number of bytes stored."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def point(self, location: str, offset: int) -> None:
        """Set where the bytes lie: a file relative to the graph's folder, and the first byte in it."""
        for initializer in self.initializers:
            initializer.data_location = TensorProto.EXTERNAL
            del initializer.external_data[:]
            for key, value in (("location", location), ("offset", offset), ("length", self.nbytes)):
                initializer.external_data.add(key=key, value=str(value))


@dataclass
class StoredWeight:
    """What is stored of a tensor of the checkpoint.

    Attributes:
        source: The tensor.
        entries: The tensor itself, possibly in another dtype, or the arrays it is encoded as (integers, scales).
        encode: Makes these arrays; None if the tensor is at most cast.
        in_place: Whether the bytes can stay in the checkpoint's file.
    """

    source: Tensor
    entries: list[Entry]
    encode: Encode | None
    in_place: bool
