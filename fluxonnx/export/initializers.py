"""Initializers whose bytes live outside a graph, and what they are stored as."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper

from fluxonnx.checkpoint.safetensors import DTYPES, ROWS, Scaling, Tensor

# dtypes of weights that need no further description.
FLOATS = ("BF16", "F16", "F32", "F64")

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


@dataclass(frozen=True)
class View:
    """An initializer that is a part of another one's bytes: `nbytes` of them, from byte `start` on."""

    initializer: TensorProto
    start: int
    nbytes: int

    @property
    def name(self) -> str:
        """The name of the initializer."""
        return self.initializer.name


@dataclass
class Entry:
    """An initializer, and the entry of a safetensors file that holds its bytes.

    The two differ in shape and type only where safetensors lacks the type (a byte there holds two int4 values).
    `aliases` are further initializers with the same bytes, `views` with some of them.
    """

    initializer: TensorProto
    dtype: str
    shape: tuple[int, ...]
    aliases: list[TensorProto] = field(default_factory=list)
    views: list[View] = field(default_factory=list)

    @property
    def initializers(self) -> list[TensorProto]:
        """The initializer, its aliases and its views."""
        return [self.initializer, *self.aliases, *(view.initializer for view in self.views)]

    @property
    def nbytes(self) -> int:
        """Number of bytes stored."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def point(self, location: str, offset: int) -> None:
        """Set where the bytes lie: a file relative to the graph's folder, and the first byte in it."""
        for initializer in (self.initializer, *self.aliases):
            _point(initializer, location, offset, self.nbytes)
        for view in self.views:
            _point(view.initializer, location, offset + view.start, view.nbytes)


def _point(initializer: TensorProto, location: str, offset: int, length: int) -> None:
    initializer.data_location = TensorProto.EXTERNAL
    del initializer.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
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


def first_rows(weights: Iterable[StoredWeight]) -> dict[str, int]:
    """Return the first row of each part of a weight that begins behind rows which are not stored."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for weight in weights:
        if weight.source.whole is not None:
            parts[weight.source.whole.name].append(weight.source)
    found = {}
    for sources in parts.values():
        end = 0
        for source in sorted(sources, key=lambda source: source.first_row):
            if source.first_row > end:
                found[source.name] = source.first_row
            end = max(end, source.first_row + source.shape[0])
    return found


def float_rows(
    tensor: Tensor, start: int = 0, end: int | None = None, row_step: int = 1, column_step: int = 1
) -> np.ndarray:
    """Return some rows of a matrix, or entries of a vector, scaled, as a float32 copy [rows, in] or [rows].

    Args:
        tensor: A tensor of floats.
        start: The first row.
        end: The row behind the last one; None for all.
        row_step: Which of these rows: every one, every second one, ...
        column_step: Likewise which columns.
    """
    values = tensor.rows(start, end)[::row_step]
    values = values[..., ::column_step] if column_step > 1 else values
    if tensor.dtype == "BF16":
        # bfloat16 is the upper half of float32; this is ten times as fast as a cast
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = values.astype(np.float32)
    _scale(values, tensor.scaling, slice(start, end, row_step), slice(None, None, column_step))
    return values


def float_columns(tensor: Tensor, start: int, end: int, even: np.ndarray, odd: np.ndarray) -> None:
    """Put the even and the odd columns of some rows of a matrix, scaled, into float32 arrays [rows, columns].

    Two neighbours in bfloat16 are the upper and the lower half of 32 bits, so no wider copy is made of them. That takes
    half of the time of `float_rows`.
    """
    values = tensor.rows(start, end)
    if tensor.dtype == "BF16" and tensor.shape[1] % 2 == 0 and values.flags.c_contiguous and sys.byteorder == "little":
        pairs = values.view(np.uint32)
        np.left_shift(pairs, np.uint32(16), out=even.view(np.uint32))
        np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=odd.view(np.uint32))
        for columns, first in ((even, 0), (odd, 1)):
            _scale(columns, tensor.scaling, slice(start, end), slice(first, None, 2))
    else:
        rows = float_rows(tensor, start, end)
        even[:], odd[:] = rows[:, 0::2], rows[:, 1::2]


def _scale(values: np.ndarray, scaling: Scaling | None, rows: slice, columns: slice) -> None:
    if scaling and scaling.columns is not None:
        values *= scaling.columns[columns]
    if scaling and scaling.rows is not None:
        values *= scaling.rows[rows].reshape(-1, *[1] * (values.ndim - 1))


def scaled(tensor: Tensor, dtype: str) -> np.ndarray:
    """Return a tensor's scaled values as a safetensors dtype."""
    values = np.empty(tensor.shape, DTYPES[dtype])
    for i in range(0, tensor.shape[0], ROWS):
        values[i : i + ROWS] = float_rows(tensor, i, i + ROWS)
    return values
