"""Constants of a graph: external data stays mapped, and narrow weights are widened only where they are multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fluxonnx.errors import FluxonnxError

# Packed two to a byte, in files as in the field raw_data.
FOUR_BITS: dict[int, Any] = {TensorProto.INT4: ml_dtypes.int4, TensorProto.UINT4: ml_dtypes.uint4}
NARROW = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


@dataclass(frozen=True)
class Packed:
    """A constant of 4-bit integers, two to a byte, the first in the low bits."""

    data: np.ndarray  # uint8 [size / 2]
    shape: tuple[int, ...]
    dtype: Any

    def rows(self, start: int, end: int) -> np.ndarray:
        """Return some rows as int8; a row has an even number of values."""
        width = math.prod(self.shape[1:])
        packed = self.data[start * width // 2 : end * width // 2]
        values = np.empty((len(packed), 2), np.int8)
        if self.dtype == ml_dtypes.int4:
            np.right_shift(np.left_shift(packed, 4).view(np.int8), 4, out=values[:, 0])
            np.right_shift(packed.view(np.int8), 4, out=values[:, 1])
        else:
            np.bitwise_and(packed, 15, out=values[:, 0].view(np.uint8))
            np.right_shift(packed, 4, out=values[:, 1].view(np.uint8))
        return values.reshape(end - start, *self.shape[1:])

    def whole(self) -> np.ndarray:
        """Return all values."""
        low, high = self.data & 15, self.data >> 4
        values = np.stack([low, high], axis=-1).reshape(-1)[: math.prod(self.shape)].view(np.int8)
        if self.dtype == ml_dtypes.int4:
            values = ((values ^ 8) - 8).astype(np.int8)
        return values.reshape(self.shape).astype(self.dtype)


@dataclass(frozen=True)
class Wide:
    """A float32 value that is not computed yet: a narrow weight to be widened, or an integer one to be scaled.

    Attributes:
        shape: Its shape.
        fill: fill(start, end, out) writes rows [start, end) into `out` [end - start, ...], float32.
        source: The narrow array, where widening is all there is to it.
        transposed: Whether the value is the transpose of those rows, for matrices.
    """

    shape: tuple[int, ...]
    fill: Callable[[int, int, np.ndarray], None]
    source: np.ndarray | None = None
    transposed: bool = False

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def transpose(self) -> Wide:
        """Return the transpose of a matrix."""
        return Wide(self.shape[::-1], self.fill, self.source, not self.transposed)

    def array(self) -> np.ndarray:
        """Compute all of it."""
        stored = self.shape[::-1] if self.transposed else self.shape
        out = np.empty(stored, np.float32)
        if out.ndim:
            self.fill(0, stored[0], out)
        elif self.source is not None:
            out[...] = self.source
        return out.T if self.transposed else out


def widened(source: np.ndarray) -> Wide:
    """Return bfloat16 or float16 values as float32, computed later."""

    def fill(start: int, end: int, out: np.ndarray) -> None:
        out[...] = source[start:end]

    return Wide(source.shape, fill, source)


class Files:
    """The files of external data beside a graph, each mapped once."""

    def __init__(self, folder: Path) -> None:
        """Find files in `folder`; none is opened yet."""
        self._folder = folder
        self._mapped: dict[str, np.ndarray] = {}

    def data(self, tensor: TensorProto) -> np.ndarray:
        """Return a tensor's bytes, mapped.

        Raises:
            FluxonnxError: The file is missing or too short, or lies outside the graph's folder.
        """
        entries: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        path = self._folder / location
        if not location or Path(location).is_absolute() or ".." in Path(location).parts:
            raise FluxonnxError(
                f"the weights {tensor.name} are said to lie in {location!r}, outside the graph's folder"
            )
        try:
            if location not in self._mapped:
                self._mapped[location] = np.memmap(path, np.uint8, "r")
            file = self._mapped[location]
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise FluxonnxError(f"{path} with the weights {tensor.name} can't be read ({why}): export again") from None
        try:
            offset, size = int(entries.get("offset", 0)), _size(tensor)
            length = int(entries.get("length", size))
        except ValueError:
            raise FluxonnxError(f"the place of the weights {tensor.name} in {path} is no number") from None
        if length != size or offset < 0 or offset + size > len(file):
            raise FluxonnxError(
                f"{path} has {len(file)} bytes, but the weights {tensor.name} are said to be {length} bytes of "
                f"{size} from {offset} on: export again with --force"
            )
        return file[offset : offset + size]

    def constant(self, tensor: TensorProto) -> Any:
        """Return a tensor's value: an array, or `Packed`.

        Raises:
            FluxonnxError: Its data is missing or damaged, or its dtype unknown.
        """
        shape = tuple(tensor.dims)
        if tensor.data_type in (TensorProto.UNDEFINED, TensorProto.STRING):
            raise FluxonnxError(f"the constant {tensor.name} has a dtype that is not supported")
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if tensor.data_type in FOUR_BITS and (external or tensor.HasField("raw_data")):
            data = self.data(tensor) if external else np.frombuffer(tensor.raw_data, np.uint8)
            return Packed(data, shape, np.dtype(FOUR_BITS[tensor.data_type]))
        if not external:
            try:
                return numpy_helper.to_array(tensor)
            except (ValueError, TypeError) as error:
                raise FluxonnxError(f"the constant {tensor.name} is damaged ({error}): export again") from None
        return self.data(tensor).view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(shape)


def _size(tensor: TensorProto) -> int:
    """Return how many bytes a tensor has."""
    count = math.prod(tensor.dims)
    if tensor.data_type in FOUR_BITS:
        return -(-count // 2)
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
