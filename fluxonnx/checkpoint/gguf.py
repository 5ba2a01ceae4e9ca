"""GGUF files: headers, and tensors as places in a file.

The format: "GGUF", a version, the numbers of tensors and of metadata entries, the entries, the tensors' names, shapes,
types and offsets, then their bytes (docs/gguf.md in ggml-org/ggml). Blocks are decoded by the package `gguf` of
llama.cpp's authors. Files of plain floats, and blocks that stay as they are, are read without it.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fluxonnx.checkpoint.encoded import Blocks, Unpack, encoded
from fluxonnx.checkpoint.reading import open_regular, shown
from fluxonnx.checkpoint.safetensors import MAX_DIMENSIONS, MAX_NAME, Tensor
from fluxonnx.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
INSTALL = "pip install fluxonnx[gguf]"
# Far beyond any model's.
MAX_ENTRIES = 1 << 20
MAX_DEPTH = 4

# Floats that are used as they are, by the numbers of ggml's types.
PLAIN = {0: "F32", 1: "F16", 30: "BF16"}


@dataclass(frozen=True)
class BlockType:
    """A type of blocks: its name, the values of a block, and its bytes."""

    name: str
    values: int
    size: int


# GGML_QUANT_SIZES of gguf/constants.py.
BLOCK_TYPES = {
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
}
# Other types, for messages.
OTHER_TYPES = {15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"}
OTHER_TYPES |= {29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}

# Numbers in metadata by their types; 8 are texts and 9 lists.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do; False where it can't be read."""
    try:
        with open_regular(path) as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parse and check the header of a GGUF file.

    Returns:
        The tensors by name, in the order of their bytes, and those metadata that are numbers and texts.

    Raises:
        CheckpointError: The file is missing, truncated, corrupt, or holds blocks of a type that can't be read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise CheckpointError(f"{path} is no whole GGUF file ({size} bytes): download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data, size)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    except (struct.error, UnicodeDecodeError, _Malformed):
        raise CheckpointError(f"{path} has a header that is cut off or malformed: download it again") from None


class _Malformed(Exception):
    pass


class _Reader:
    """Reads a header from start to end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def count(self, most: int) -> int:
        value = self.number("<Q")
        if value > most:
            raise _Malformed
        return value

    def text(self, most: int | None = None) -> str:
        length = self.count(len(self.data) if most is None else most)
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise _Malformed
        return self.data[start : self.at].decode("utf-8", "strict" if most else "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a value of metadata; a list is skipped."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST or depth > MAX_DEPTH:
            raise _Malformed
        inner, count = self.number("<I"), self.count(len(self.data))
        if inner in _NUMBERS:
            self.at += count * struct.calcsize(_NUMBERS[inner])
            return None
        for _ in range(count):
            self.value(inner, depth + 1)
        return None


def _parse(path: Path, data: mmap.mmap, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    reader = _Reader(data)
    version = reader.number("<I")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path} is GGUF of version {version}, but fluxonnx reads {VERSIONS[0]} and {VERSIONS[1]}"
        )
    tensors, entries = reader.count(MAX_ENTRIES), reader.count(MAX_ENTRIES)
    metadata = {}
    for _ in range(entries):
        key = reader.text(MAX_NAME)
        metadata[key] = reader.value(reader.number("<I"))
    listed = []
    for _ in range(tensors):
        name = reader.text(MAX_NAME)
        dimensions = reader.number("<I")
        if dimensions > MAX_DIMENSIONS:
            raise _Malformed
        # ggml counts dimensions from the last
        shape = tuple(reader.count(1 << 40) for _ in range(dimensions))[::-1]
        listed.append((name, shape, reader.number("<I"), reader.number("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
        raise _Malformed
    start = -(-reader.at // alignment) * alignment
    found: dict[str, Tensor] = {}
    for name, shape, kind, offset in sorted(listed, key=lambda item: item[3]):
        if name in found:
            raise CheckpointError(f"{path} holds {name} twice: download it again")
        found[name] = _tensor(path, name, shape, kind, start + offset)
        end = start + offset + found[name].nbytes
        if end > size:
            raise CheckpointError(f"{path} is truncated: {size} bytes, but {name} ends at {end}: download it again")
    return found, metadata


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    count = 1
    for n in shape:
        count *= n
    if kind in PLAIN:
        dtype = PLAIN[kind]
        return Tensor(name, dtype, shape, path, offset, count * (4 if dtype == "F32" else 2))
    if kind not in BLOCK_TYPES:
        known = ", ".join([*PLAIN.values(), *(item.name for item in BLOCK_TYPES.values())])
        raise CheckpointError(
            f"{path}: {name} is {OTHER_TYPES.get(kind, f'of type {shown(kind)}')}, which fluxonnx can't read: use a "
            f"file of {known}"
        )
    block = BLOCK_TYPES[kind]
    if not shape or shape[-1] % block.values:
        raise CheckpointError(f"{path}: rows of {name} {list(shape)} are no whole blocks of {block.values} values")
    place = Tensor(name, block.name, shape, path, offset, count // block.values * block.size)
    unpack = {"Q8_0": _unpack_q8_0, "Q4_0": _unpack_q4_0}.get(block.name)
    if unpack:
        blocks = Blocks(int(block.name[1]), block.values, unpack)
        return encoded(place, block.name, partial(_multiplied, unpack), blocks=blocks)
    if find_spec("gguf") is None:
        raise CheckpointError(
            f"{path} has blocks of {block.name} ({name}), for which fluxonnx needs the package gguf: {INSTALL}"
        )
    return encoded(place, block.name, partial(_decoded, kind))


def _decoded(kind: int, raw: np.ndarray, first: int) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(np.asarray(raw), GGMLQuantizationType(kind))


def _multiplied(unpack: Unpack, raw: np.ndarray, first: int) -> np.ndarray:
    integers, scales = unpack(raw)
    values = integers.astype(np.float32).reshape(*scales.shape, -1) * scales[..., None]
    return values.reshape(integers.shape)


def _unpack_q8_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of a float16 scale and 32 signed bytes."""
    blocks = np.asarray(raw).reshape(len(raw), -1, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    return blocks[..., 2:].view(np.int8).reshape(len(raw), -1), scales


def _unpack_q4_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of a float16 scale and 16 bytes: the first 16 values in the low halves, the others in the high ones."""
    blocks = np.asarray(raw).reshape(len(raw), -1, 18)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    packed = blocks[..., 2:]
    values = np.concatenate([packed & 15, packed >> 4], -1).view(np.int8) - np.int8(8)
    return values.reshape(len(raw), -1), scales
