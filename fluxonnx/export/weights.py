"""Where a graph's weights lie: in the checkpoint's own files, or in a safetensors file of the build."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

from fluxonnx.checkpoint import DTYPES, Checkpoint, fingerprint, read_header
from fluxonnx.errors import CheckpointError, ExportError
from fluxonnx.export.graph import Graph, StoredWeight
from fluxonnx.files import replacing

# Converting works on this many values at a time, so that memory does not grow with the tensor.
CHUNK = 1 << 24


@dataclass(frozen=True)
class StoredFile:
    """A weight file of a build; `bytes_written` is 0 if it was there already."""

    name: str
    bytes_written: int


def weight_file(component: str, folder: str, precision: str) -> str:
    """Name a component's weight file: transformer/fp32.safetensors, vae/decoder.fp32.safetensors."""
    part = component.removeprefix(folder).lstrip("_")
    return f"{folder}/{'.'.join(filter(None, (part, precision, 'safetensors')))}"


def place(
    graph: Graph, root: Path, component: str, folder: str, precision: str, say: Callable[[int, int], None]
) -> StoredFile | None:
    """Write the weights that can't stay where they are, and point every initializer at its bytes.

    Returns:
        The build's weight file, or None if all weights stay in the checkpoint.

    Raises:
        CheckpointError: A weight file is a symbolic link.
        ExportError: There is not enough space.
    """
    for weight in graph.weights:
        if weight.in_place:
            _refuse_link(root, weight.source.file)
            location = weight.source.file.relative_to(root).as_posix()
            _point(weight.initializer, location, weight.source.offset, weight.source.nbytes)
    converted = [weight for weight in graph.weights if not weight.in_place]
    if not converted:
        return None

    name = weight_file(component, folder, precision)
    header, offsets, size = _plan(converted)
    for weight, offset in zip(converted, offsets, strict=True):
        _point(weight.initializer, name, offset, weight.nbytes)
    path = root / name
    if path.is_file() and path.stat().st_size == size and path.open("rb").read(len(header)) == header:
        return StoredFile(name, 0)
    require_space(root, size, name)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for weight in converted:
            array = weight.source.array().reshape(-1)
            for start in range(0, array.size, CHUNK):
                file.write(array[start : start + CHUNK].astype(DTYPES[weight.dtype]).tobytes())
                say(file.tell(), size)
    return StoredFile(name, size)


def _point(initializer: TensorProto, location: str, offset: int, length: int) -> None:
    initializer.data_location = TensorProto.EXTERNAL
    del initializer.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        initializer.external_data.add(key=key, value=str(value))


def _plan(weights: list[StoredWeight]) -> tuple[bytes, list[int], int]:
    """Return the header of a safetensors file for `weights`, each weight's offset in the file, and the file's size."""
    entries: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "producer": "fluxonnx",
            # So that a file made from another checkpoint is told from this one by its header alone.
            "source": ",".join(fingerprint(file) for file in sorted({weight.source.file for weight in weights})),
        }
    }
    end = 0
    starts = []
    for weight in weights:
        starts.append(end)
        end += weight.nbytes
        offsets = [starts[-1], end]
        entries[weight.source.name] = {
            "dtype": weight.dtype,
            "shape": list(weight.source.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Data starts at a page boundary, so that mapped tensors are aligned for any dtype.
    text += b" " * (-(len(text) + 8) % 4096)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + start for start in starts], len(header) + end


def require_space(folder: Path, size: int, what: object) -> None:
    """Refuse to start writing what can't be finished.

    Raises:
        ExportError: Less than `size` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ExportError(
            f"{what} needs {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {folder}: free some space"
        )


def _refuse_link(root: Path, file: Path) -> None:
    # onnxruntime and onnx.checker both refuse external data behind links or outside the graph's folder.
    parts = [root / Path(*file.relative_to(root).parts[: i + 1]) for i in range(len(file.relative_to(root).parts))]
    link = next((part for part in parts if part.is_symlink()), None)
    if link is not None:
        raise CheckpointError(
            f"{link} is a symbolic link (a hub cache?), which ONNX can't use for weights: make a self-contained copy "
            "with -o DIR, or download with `hf download ... --local-dir DIR`"
        )


def copy_model(checkpoint: Checkpoint, output: Path, say: Callable[[str, int, int], None]) -> Checkpoint:
    """Copy a model's files (links resolved) so that `output` depends on nothing else; files there already are kept.

    Raises:
        CheckpointError: `output` holds another model.
        ExportError: There is not enough space, or the folder can't be made.
    """
    if output.exists() and output.resolve() == checkpoint.root.resolve():
        return checkpoint
    if not output.parent.is_dir():
        raise ExportError(f"folder {output.parent} does not exist: create it, or choose another -o")
    for file in checkpoint.files():
        if file.suffix == ".safetensors":
            read_header(file)  # a corrupt file is refused before 16 GB are copied
    output.mkdir(exist_ok=True)
    pending = [file for file in checkpoint.files() if not _same(file, output / file.relative_to(checkpoint.root))]
    for file in pending:
        existing = output / file.relative_to(checkpoint.root)
        if existing.exists():
            raise ExportError(f"{existing} exists and differs from {file}: choose an empty folder for -o")
    total = sum(file.stat().st_size for file in pending)
    require_space(output, total, "the copy")
    done = 0
    for file in pending:
        target = output / file.relative_to(checkpoint.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            shutil.copyfile(file, temporary)
        done += file.stat().st_size
        say("copy", done, total)
    return Checkpoint(output)


def _same(source: Path, target: Path) -> bool:
    if not target.is_file() or source.stat().st_size != target.stat().st_size:
        return False
    if source.suffix == ".safetensors":
        return fingerprint(source) == fingerprint(target)
    return np.array_equal(np.fromfile(source, np.uint8), np.fromfile(target, np.uint8))
