"""The model directory: configs, shards, safetensors headers, and the table of tensors.

Reads the layout that `diffusers` saves (one folder per component). Nothing here loads a weight into memory unless
asked: a tensor is a place in a file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fluxonnx.errors import CheckpointError

# safetensors dtype names that a checkpoint of this family can hold -> numpy
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

# File name stems by which diffusers and transformers save a component.
STEMS = ("diffusion_pytorch_model", "model")

COMPONENT_CLASSES = {
    "transformer": "Flux2Transformer2DModel",
    "vae": "AutoencoderKLFlux2",
    "text_encoder": "Qwen3ForCausalLM",
}
PIPELINE_CLASS = "Flux2KleinPipeline"


@dataclass(frozen=True)
class Tensor:
    """One tensor's place in a safetensors file.

    Attributes:
        name: Its name in the checkpoint.
        dtype: The safetensors dtype name, a key of `DTYPES`.
        shape: Its shape.
        file: The file that holds it.
        offset: First byte, counted from the start of the file.
        nbytes: Length in bytes.
        swapped: Whether the second half of its first dimension is to come first.
        quantisation: For integers that stand for weights: which.
        whole: The tensor that this is a part of, if it was split.
        first_row: Which of its rows comes first here.
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

    def array(self) -> np.ndarray:
        """Map the tensor's bytes, read-only and, unless `swapped`, without copying, as an array of `shape`."""
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,)) if self.nbytes else np.empty(0, np.uint8)
        array = raw.view(DTYPES[self.dtype]).reshape(self.shape)
        return np.concatenate(np.split(array, 2)[::-1]) if self.swapped else array

    def split(self, sizes: Sequence[int]) -> list[Tensor]:
        """Return runs of so many rows each as tensors called NAME.0, NAME.1, ...; one of `swapped` halves is in one."""
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
                    whole=self.whole or self,
                    first_row=self.first_row + start,
                )
            )
        return parts


@dataclass(frozen=True)
class Quantisation:
    """How integers [out, in] stand for weights: they are multiplied by a scale.

    Attributes:
        scale: One number, or one for each output: [], [1], [out] or [out, 1].
        rotation: So many inputs at a time have been multiplied by a Hadamard matrix; 0 for none.
    """

    scale: Tensor
    rotation: int = 0

    def split(self, sizes: Sequence[int]) -> list[Quantisation]:
        """Return what runs of so many rows each stand for."""
        scales = self.scale.split(sizes) if math.prod(self.scale.shape) > 1 else [self.scale] * len(sizes)
        return [replace(self, scale=scale) for scale in scales]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the model directory is not complete, download it again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


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
    for before, after in itertools.pairwise(tensors):
        if before.offset + before.nbytes > after.offset:
            raise CheckpointError(f"{path}: the bytes of {before.name} and {after.name} overlap: download it again")
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata in the header of a safetensors file; raises as `read_header` does."""
    metadata = _header(path)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return a file's header, where its data starts, and its size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header_bytes = file.read(length) if size >= 8 and length <= MAX_HEADER_BYTES else b""
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the model directory is not complete, download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    if size < 8 or length > MAX_HEADER_BYTES or len(header_bytes) < length:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({size} bytes, header of {length} bytes): download it again"
        )
    try:
        header = json.loads(header_bytes)
    except ValueError:
        raise CheckpointError(f"{path} has a header that is not JSON: download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object: download it again")
    return header, 8 + length, size


def _header_entry(path: Path, name: str, entry: Any, data_start: int, file_size: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: the header entry of {name} is malformed: download it again") from None
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
        raise CheckpointError(f"{path}: the header entry of {name} is malformed: download it again")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: {name} takes {end - begin} bytes, but {dtype} {list(shape)} needs {expected}: download it again"
        )
    if data_start + end > file_size:
        raise CheckpointError(
            f"{path} is truncated: {file_size} bytes, but {name} ends at {data_start + end}: download it again"
        )
    return Tensor(name, dtype, shape, path, data_start + begin, end - begin)


def fingerprint(path: Path, samples: int = 64, block: int = 4096) -> str:
    """SHA-256 of a safetensors file's size, header, and blocks spread over its data.

    Tells whether a checkpoint was replaced since it was exported, without reading 8 GB.

    Raises:
        CheckpointError: The file can't be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            prefix = file.read(8)
            header_end = 8 + min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES)
            digest.update(prefix + file.read(header_end - 8))
            for i in range(samples):
                file.seek(header_end + (size - header_end) * i // samples)
                digest.update(file.read(block))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    return digest.hexdigest()


def weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """Find a component's safetensors files.

    Returns:
        The index file (None when the component is a single file) and the files it names, sorted.
    """
    for stem in STEMS:
        single = folder / f"{stem}.safetensors"
        if single.is_symlink() or single.exists():
            return None, [single]
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f'{index} has no "weight_map": download it again')
            names = sorted({str(name) for name in weight_map.values()})
            if any(Path(name).name != name for name in names):
                raise CheckpointError(f"{index} names a file outside its folder, which is never right")
            return index, [folder / name for name in names]
    expected = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    raise CheckpointError(f"{folder} holds no weights (expected {expected}): download the model's safetensors files")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read a component's tensor table from its single file or from all of its shards.

    Raises:
        CheckpointError: A file or a tensor that the index names is missing, or a file is corrupt.
    """
    index, files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{name} is in both {tensors[name].file.name} and {file.name} of {folder}")
            tensors[name] = tensor
    if index is not None:
        for name, file_name in read_json(index)["weight_map"].items():
            if name not in tensors or tensors[name].file.name != file_name:
                raise CheckpointError(f"{index} says that {name} is in {file_name}, where it is not: download it again")
    return tensors


class Config:
    """One component's `config.json`, whose values are checked as they are read."""

    def __init__(self, path: Path, values: dict[str, Any] | None = None) -> None:
        """Read the file at `path`, unless its `values` are given."""
        self.path = path
        self.values = read_json(path) if values is None else values

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f'{self.path} has no "{key}"')
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f'{self.path}: "{key}" is {value!r}, expected a positive integer')
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(f'{self.path}: "{key}" is {value!r}, expected a number')
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f'{self.path}: "{key}" is {value!r}, expected true or false')
        return value

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return a non-empty list of positive integers."""
        value = self._get(key, default)
        if not isinstance(value, (list, tuple)) or not value or any(not isinstance(n, int) or n < 1 for n in value):
            raise CheckpointError(f'{self.path}: "{key}" is {value!r}, expected a list of positive integers')
        return tuple(value)

    def expect(self, key: str, *known: Any, missing_ok: bool = True) -> None:
        """Refuse a value other than the `known` ones: it would silently change what the model computes."""
        value = self.values.get(key)
        if value not in known and not (value is None and missing_ok):
            names = " or ".join(json.dumps(item) for item in known)
            raise CheckpointError(f'{self.path}: "{key}" is {json.dumps(value)}, but fluxonnx knows only {names}')


def _placed(file: Path, root: Path) -> Path:
    """Return a file's path such that it starts with `root` if it lies there, and is absolute if not."""
    absolute, folder = file.parent.resolve() / file.name, root.resolve()
    return root / absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute


class Checkpoint:
    """A model directory in the Hugging Face layout of FLUX.2-klein."""

    def __init__(self, root: str | Path, transformer: str | Path | None = None) -> None:
        """Open the directory and check what kind of model it is.

        Args:
            root: The directory.
            transformer: A safetensors file to take the transformer's weights from instead.

        Raises:
            CheckpointError: It does not exist, has no model_index.json, or is another kind of pipeline.
        """
        self.root = Path(root)
        self.transformer = _placed(Path(transformer), self.root) if transformer else None
        if not self.root.is_dir():
            why = "is not a directory" if self.root.exists() else "does not exist"
            raise CheckpointError(f"model directory {self.root} {why}: pass the folder that holds model_index.json")
        if self.transformer and not self.transformer.is_file():
            raise CheckpointError(f"--transformer {self.transformer} is not a file: pass a .safetensors file")
        self.index = Config(self.root / "model_index.json")
        found = self.index.values.get("_class_name")
        if found != PIPELINE_CLASS:
            raise CheckpointError(
                f'{self.index.path}: "_class_name" is {json.dumps(found)}, but fluxonnx runs {PIPELINE_CLASS} '
                "(the FLUX.2-klein models)"
            )

    @property
    def name(self) -> str:
        """The model's name as a person knows it: the folder's, or the repository's in a hub cache."""
        path = self.root.resolve()
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.parent.parent.name.split("--")[-1]
        return path.name

    @cached_property
    def is_distilled(self) -> bool:
        """Whether the model was distilled to run in a few steps without guidance."""
        return self.index.flag("is_distilled", False)

    def config(self, component: str) -> Config:
        """Read `component`'s config.json and check its class.

        Raises:
            CheckpointError: It is missing, corrupt, or of another class.
        """
        config = Config(self.root / component / "config.json")
        expected = COMPONENT_CLASSES[component]
        found = config.values.get("_class_name") or next(iter(config.values.get("architectures") or []), None)
        if found != expected:
            raise CheckpointError(f"{config.path} describes a {found}, but fluxonnx knows only {expected}")
        return config

    def tensors(self, component: str) -> dict[str, Tensor]:
        """Read the tensor table of `component` (text_encoder, transformer or vae), by the names in its files."""
        if component == "transformer" and self.transformer:
            return read_header(self.transformer)
        return read_tensors(self.root / component)

    def has_weights(self, component: str) -> bool:
        """Whether `component` has weight files; a copy of a quantised build has none but its own."""
        folder = self.root / component
        return any((folder / f"{stem}.safetensors{end}").exists() for stem in STEMS for end in ("", ".index.json"))

    def files(self) -> Iterator[Path]:
        """Yield every file in the directory that the model needs: configs, tokenizer, weights."""
        yield self.index.path
        for folder in ("scheduler", "tokenizer"):
            yield from sorted(path for path in (self.root / folder).glob("*") if path.is_file())
        for component in COMPONENT_CLASSES:
            yield self.root / component / "config.json"
            if component == "transformer" and self.transformer:
                continue
            index, files = weight_files(self.root / component)
            if index is not None:
                yield index
            yield from files
