"""Safetensors files: headers, and tensors as places in a file.

Nothing here loads a weight into memory unless it is asked to.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from fluxonnx.checkpoint.reading import foreign, open_regular, parse_json, shown
from fluxonnx.errors import CheckpointError

# The one table of dtypes: safetensors names -> numpy. ONNX types follow from the numpy ones.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

# The safetensors library refuses longer headers; so do we, before reading one into memory.
MAX_HEADER_BYTES = 100_000_000
# Rows that are computed or converted at a time: memory does not grow with the tensor, and their float32 copy stays in
# the processor's caches.
ROWS = 128
# Far beyond any model's tensors; numpy has at most 64 dimensions.
MAX_NAME = 1000
MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class Tensor:
    """One tensor's place in a safetensors file.

    Attributes:
        name: Its name in the checkpoint.
        dtype: The safetensors dtype name; what is not a key of `DTYPES` can't be read.
        shape: Its shape.
        file: The file that holds it.
        offset: First byte, counted from the start of the file.
        nbytes: Length in bytes.
        swapped: Whether the two halves of its first dimension change places when it is read.
        quantisation: How its integers encode weights; None for floats.
        whole: The tensor that this one is a slice of; None for a tensor of the file.
        first_row: The row of `whole` at which the slice starts.
        scaling: What its values are multiplied by before they are used; None for nothing.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    swapped: bool = False
    quantisation: Quantisation | None = None
    whole: Tensor | None = None
    first_row: int = 0
    scaling: Scaling | None = None
    # Whether `array` and `rows` compute their values from the bytes, in a subclass.
    computed: ClassVar[bool] = False

    @property
    def is_plain(self) -> bool:
        """Whether its bytes in the file are its values as they are."""
        return not self.swapped and not self.quantisation

    def array(self) -> np.ndarray:
        """Map the tensor's bytes, read-only and, unless `swapped`, without copying, as an array of `shape`.

        Neither `quantisation` nor `scaling` is applied.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: {self.name} has dtype {shown(self.dtype)}, expected one of {', '.join(DTYPES)}"
            )
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,)) if self.nbytes else np.empty(0, np.uint8)
        array = raw.view(DTYPES[self.dtype]).reshape(self.shape)
        return np.concatenate(np.split(array, 2)[::-1]) if self.swapped else array

    def rows(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """Return the rows `start` to `end` of `array`."""
        return self.array()[start:end]

    def pieces(self, count: int) -> Iterator[np.ndarray]:
        """Yield the values of `array` in order: at most `count` at a time, or `ROWS` rows where they are computed.

        Each piece is mapped by itself, because the pages of a mapping count as memory for as long as it lasts.
        """
        size = math.prod(self.shape)
        if self.computed and self.shape:
            yield from (self.rows(start, start + ROWS) for start in range(0, self.shape[0], ROWS))
            return
        if self.computed or self.swapped:
            yield self.array()
            return
        for start in range(0, size, count):
            shape, width = (min(count, size - start),), self.nbytes // size
            yield replace(self, shape=shape, offset=self.offset + start * width, nbytes=shape[0] * width).array()

    def split(self, sizes: Sequence[int]) -> list[Tensor]:
        """Split into blocks of rows, NAME.0, NAME.1, ...; no block may cross the middle of a `swapped` tensor."""
        count = self.shape[0]
        row = self.nbytes // count if count else 0
        quantisations = self.quantisation.split(sizes) if self.quantisation else [None] * len(sizes)
        parts = []
        for i, (start, end) in enumerate(itertools.pairwise([0, *itertools.accumulate(sizes)])):
            first = (start + count // 2) % count if self.swapped else start
            assert first + end - start <= count, f"{self.name}: rows {start} to {end} are not side by side"
            parts.append(
                replace(
                    self,
                    name=f"{self.name}.{i}",
                    shape=(end - start, *self.shape[1:]),
                    offset=self.offset + first * row,
                    nbytes=(end - start) * row,
                    swapped=False,
                    quantisation=quantisations[i],
                    scaling=self.scaling.slice(start, end) if self.scaling else None,
                    whole=self.whole or self,
                    first_row=self.first_row + start,
                )
            )
        return parts


@dataclass(frozen=True)
class Quantisation:
    """How integers [out, in] encode weights: weight = integer * scale.

    Attributes:
        scale: One number, or one per output: [], [1], [out] or [out, 1].
        rotation: Size of the Hadamard matrix that each group of inputs was multiplied by; 0 for none.
        marked: Whether the file says so; else `rotation` is a guess.
    """

    scale: Tensor
    rotation: int = 0
    marked: bool = True

    def split(self, sizes: Sequence[int]) -> list[Quantisation]:
        """Return the quantisation of each block of rows."""
        scales = self.scale.split(sizes) if math.prod(self.scale.shape) > 1 else [self.scale] * len(sizes)
        return [replace(self, scale=scale) for scale in scales]


@dataclass(frozen=True)
class Scaling:
    """Powers of two that a tensor's values are multiplied by: float32, one per row (entry) and one per column."""

    rows: np.ndarray | None = field(default=None, compare=False)
    columns: np.ndarray | None = field(default=None, compare=False)

    def slice(self, start: int, end: int) -> Scaling:
        """Return the scaling of some rows."""
        return replace(self, rows=None if self.rows is None else self.rows[start:end])


def read_header(path: Path) -> dict[str, Tensor]:
    """Parse and validate the header of a safetensors file.

    The format: 8 bytes little-endian header length, a JSON object, then the data that its offsets point into
    (https://github.com/huggingface/safetensors, README "Format").

    Returns:
        The tensors by name, in the order of their bytes in the file.

    Raises:
        CheckpointError: The file is missing, truncated or corrupt; the message says which check failed.
    """
    header, start, size = _header(path)
    header.pop("__metadata__", None)
    tensors = [_header_entry(path, name, entry, start, size) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    # Without this check, a header that lost a byte would shift all weights.
    end = start
    for before, tensor in zip([None, *tensors], tensors, strict=False):
        if tensor.offset < end and before:
            raise CheckpointError(f"{path}: the bytes of {before.name} and {tensor.name} overlap: download it again")
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: {tensor.offset - end} bytes before {tensor.name} belong to no tensor: download it again"
            )
        end = tensor.offset + tensor.nbytes
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes, but its tensors end at {end}: download it again")
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file; raises as `read_header` does."""
    return _header(path)[0].get("__metadata__", {})


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return a file's header, where its data starts, and its size."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            whole = size >= 8 + length and 0 < length <= MAX_HEADER_BYTES
            header_bytes = file.read(length if whole else 64)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the model directory is not complete, download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    if what := foreign(prefix + header_bytes[:64]):
        raise CheckpointError(f"{path} {what}")
    if size < 8 or not whole:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({size} bytes, header of {length} bytes): download it again"
        )
    try:
        header = parse_json(header_bytes)
    except ValueError as error:
        raise CheckpointError(f"{path} has a header that is not JSON ({error}): download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object: download it again")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{path} has metadata that are not texts: download it again")
    return header, 8 + length, size


def _header_entry(path: Path, name: str, entry: Any, data_start: int, file_size: int) -> Tensor:
    malformed = CheckpointError(f"{path}: the header entry of {shown(name)} is malformed: download it again")
    if not isinstance(entry, dict) or len(name) > MAX_NAME:
        raise malformed
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(dtype, str)
        or len(dtype) > MAX_NAME
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
    ):
        raise malformed
    numbers = (*shape, *offsets)
    if len(dtype) > MAX_NAME or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise malformed
    if any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 2**63 for n in numbers):
        raise malformed
    begin, end = offsets
    if begin > end:
        raise malformed
    # A tensor of a dtype that numpy lacks does no harm unless it is used, where its dtype is checked.
    expected = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: {name} takes {end - begin} bytes, but {dtype} {shape} needs {expected}: download it again"
        )
    if data_start + end > file_size:
        raise CheckpointError(
            f"{path} is truncated: {file_size} bytes, but {name} ends at {data_start + end}: download it again"
        )
    return Tensor(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def fingerprint(path: Path, samples: int = 64, block: int = 4096) -> str:
    """SHA-256 of a weight file's size, header, and blocks spread over its data.

    Tells whether a checkpoint was replaced since it was exported, without reading 8 GB.

    Raises:
        CheckpointError: The file can't be read.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            prefix = file.read(8)
            header = int.from_bytes(prefix, "little")
            # other formats begin with something else, which is no length
            header_end = 8 + (header if header <= MAX_HEADER_BYTES else 0)
            digest.update(prefix + file.read(header_end - 8))
            for i in range(samples):
                file.seek(header_end + (size - header_end) * i // samples)
                digest.update(file.read(block))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    return digest.hexdigest()
