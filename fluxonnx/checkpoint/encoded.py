"""Tensors whose bytes are another form of their floats: 8- and 4-bit floats with scales, and blocks of integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from fluxonnx.checkpoint.safetensors import DTYPES, ROWS, Tensor
from fluxonnx.errors import CheckpointError

# bytes of some rows, uint8 [rows, bytes], and the first of these rows in the file's tensor -> float32 [rows, columns]
Decode = Callable[[np.ndarray, int], np.ndarray]
# bytes of some rows -> int8 [rows, columns] and float32 [rows, columns / block]; weight = integer * scale
Unpack = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Float8:
    """What a graph needs to make floats of the bytes themselves: their dtype, and a scale for all or for each row."""

    dtype: str
    scale: Tensor | None = None

    def swapped(self) -> Float8:
        """Return the same for a tensor whose halves change places."""
        if self.scale is None or math.prod(self.scale.shape) == 1:
            return self
        return replace(self, scale=replace(self.scale, swapped=True))

    def split(self, sizes: Sequence[int]) -> list[Float8]:
        """Return the same for each block of rows."""
        if self.scale is None or math.prod(self.scale.shape) == 1:
            return [self] * len(sizes)
        return [replace(self, scale=scale) for scale in self.scale.split(sizes)]


@dataclass(frozen=True)
class Blocks:
    """Integers of `bits` bits around zero; `size` neighbours in a row share a scale."""

    bits: int
    size: int
    unpack: Unpack = field(compare=False)


def _not_set(raw: np.ndarray, first: int) -> np.ndarray:
    raise AssertionError("a tensor without a decoder")


@dataclass(frozen=True)
class Encoded(Tensor):
    """A tensor that is decoded when it is read; `dtype` and `shape` are those of the floats, F32.

    Attributes:
        form: What the bytes are, as a person knows it: "fp8", "nvfp4", "Q4_K".
        decode: Makes floats of the bytes of some rows.
        start: The first byte of the file's tensor, of which this one may be a part.
        scales: Tensors of scales, all of which must be numbers.
        float8: How the bytes can be used as they are, if they are 8-bit floats.
        blocks: Likewise, if they are blocks of integers.
    """

    form: str = ""
    decode: Decode = field(default=_not_set, compare=False)
    start: int = 0
    scales: tuple[Tensor, ...] = ()
    float8: Float8 | None = None
    blocks: Blocks | None = None
    computed: ClassVar[bool] = True

    @property
    def is_plain(self) -> bool:
        """False: the bytes are not the values."""
        return False

    def array(self) -> np.ndarray:
        """Decode all of the tensor; `scaling` is not applied."""
        values = np.empty(self.shape, DTYPES[self.dtype])
        if not self.shape:
            return self._decoded(0, 1).reshape(()).astype(values.dtype)
        for i in range(0, len(values), ROWS):
            values[i : i + ROWS] = self.rows(i, i + ROWS)
        return values

    def rows(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """Decode the rows `start` to `end`."""
        pieces = [self._decoded(first, last) for first, last in self._stored(start, end)]
        rows = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return rows.reshape(-1, *self.shape[1:]).astype(DTYPES[self.dtype], copy=False)

    def split(self, sizes: Sequence[int]) -> list[Tensor]:
        """Split into blocks of rows as `Tensor.split` does."""
        parts = super().split(sizes)
        if self.float8 is None:
            return parts
        return [replace(p, float8=float8) for p, float8 in zip(parts, self.float8.split(sizes), strict=True)]  # type: ignore[call-arg]

    def unpacked(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the integers of `blocks` and their scales: int8 [rows, columns], float32 [rows, columns / size]."""
        assert self.blocks is not None
        found = [self.blocks.unpack(self._bytes(*place)) for place in self._stored(0, None)]
        integers, scales = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return integers, scales

    def _stored(self, start: int, end: int | None) -> Iterator[tuple[int, int]]:
        """Yield where rows lie: the halves of a `swapped` tensor have changed places."""
        count = self.shape[0] if self.shape else 1
        start, end, _ = slice(start, end).indices(count)
        if not self.swapped:
            yield start, end
            return
        half = count // 2
        for low, shift in ((0, half), (half, -half)):
            first, last = max(start, low), min(end, low + half)
            if first < last or (start == end and low == 0):
                yield first + shift, last + shift

    def _decoded(self, start: int, end: int) -> np.ndarray:
        raw = self._bytes(start, end)
        return self.decode(raw, (self.offset - self.start) // raw.shape[1] + start if raw.shape[1] else 0)

    def _bytes(self, start: int, end: int) -> np.ndarray:
        count = self.shape[0] if self.shape else 1
        return raw_bytes(self).reshape(count, self.nbytes // count if count else 0)[start:end]


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """Map a tensor's bytes, read-only: uint8 [nbytes]."""
    if not tensor.nbytes:
        return np.empty(0, np.uint8)
    return np.memmap(tensor.file, np.uint8, "r", tensor.offset, (tensor.nbytes,))


def encoded(
    tensor: Tensor,
    form: str,
    decode: Decode,
    shape: tuple[int, ...] | None = None,
    scales: tuple[Tensor, ...] = (),
    float8: Float8 | None = None,
    blocks: Blocks | None = None,
) -> Encoded:
    """Return a tensor of a file as one that is decoded; `shape` is that of the floats, by default the file's."""
    return Encoded(
        tensor.name,
        "F32",
        tensor.shape if shape is None else shape,
        tensor.file,
        tensor.offset,
        tensor.nbytes,
        form=form,
        decode=decode,
        start=tensor.offset,
        scales=scales,
        float8=float8,
        blocks=blocks,
    )


def refuse_infinite(scale: Tensor, largest: float) -> None:
    """Check that scales, times the largest value that they multiply, are finite numbers; this reads them.

    Raises:
        CheckpointError: One of them is none.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        products = scale.array().astype(np.float32) * np.float32(largest)
    if not np.isfinite(products).all():
        raise CheckpointError(f"{scale.file}: {scale.name} holds infinities or NaNs: download it again")
