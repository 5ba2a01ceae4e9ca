"""Where a graph's weights lie: in the checkpoint's own files, or in a safetensors file of the build."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import TensorProto

from fluxonnx.checkpoint import DTYPES, Checkpoint, fingerprint, read_header
from fluxonnx.errors import CheckpointError, ExportError
from fluxonnx.export.graph import Entry, Graph, StoredWeight
from fluxonnx.files import replacing, resuming

# Tensors that are quantised at a time, each by a thread.
WORKERS = min(os.cpu_count() or 1, 4)

# Converting works on this many values at a time, so that memory does not grow with the tensor.
CHUNK = 1 << 24


@dataclass(frozen=True)
class StoredFile:
    """A weight file of a build; `bytes_written` is 0 if it was there already."""

    name: str
    bytes_written: int


def weight_file(component: str, folder: str, label: str) -> str:
    """Name a component's weight file: transformer/fp32.safetensors, vae/decoder.fp32.safetensors."""
    part = component.removeprefix(folder).lstrip("_")
    return f"{folder}/{'.'.join(filter(None, (part, label, 'safetensors')))}"


def place(
    graph: Graph, root: Path, name: str, settings: dict[str, str], say: Callable[[int, int], None]
) -> StoredFile | None:
    """Write the weights that can't stay where they are, and point every initializer at its bytes.

    What an interrupted run left is used: only the tensors it did not get to are made.

    Args:
        graph: The graph.
        root: The folder that the graph will be in.
        name: The weight file, relative to `root`.
        settings: What the bytes depend on besides the checkpoint; kept in the file.
        say: Called with bytes written and bytes in all.

    Returns:
        The build's weight file, or None if all weights stay in the checkpoint.

    Raises:
        CheckpointError: A weight file is a symbolic link.
        ExportError: There is not enough space, or another process is writing the same file.
    """
    made = []
    for weight in graph.weights:
        if not weight.in_place or not weight.source.file.is_relative_to(root):
            made.append(weight)
            continue
        _refuse_link(root, weight.source.file)
        location = weight.source.file.relative_to(root).as_posix()
        _point(weight.entries[0], location, weight.source.offset, weight.source.nbytes)
    if not made:
        return None

    header, starts, size = _plan(made, settings)
    for weight, start in zip(made, starts, strict=True):
        for entry in weight.entries:
            _point(entry, name, start, entry.nbytes)
            start += entry.nbytes
    path = root / name
    if path.is_file() and path.stat().st_size == size and path.open("rb").read(len(header)) == header:
        return StoredFile(name, 0)
    path.parent.mkdir(exist_ok=True)
    with resuming(path, header) as file:
        done = file.tell()
        require_space(root, size - done, name)
        whole = sum(end <= done for end in [*starts[1:], size])
        file.seek(starts[whole] if whole < len(made) else size)
        for _ in _written(made[whole:], file):
            say(file.tell(), size)
    return StoredFile(name, size)


def _written(weights: list[StoredWeight], file: BinaryIO) -> Iterator[None]:
    """Write weights in turn; yields now and then. Those that take thinking are made ahead, in parallel."""
    ahead = deque(weight for weight in weights if weight.encode)
    coming: deque[Future] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for weight in weights:
                while ahead and len(coming) <= WORKERS:
                    encode, source = ahead[0].encode, ahead.popleft().source
                    assert encode is not None
                    coming.append(pool.submit(encode, source))
                if weight.encode:
                    for array, entry in zip(coming.popleft().result(), weight.entries, strict=True):
                        assert array.nbytes == entry.nbytes, entry
                        file.write(np.ascontiguousarray(array).view(np.uint8).data)
                    yield
                    continue
                array = weight.source.array().reshape(-1)
                for start in range(0, array.size, CHUNK):
                    file.write(array[start : start + CHUNK].astype(DTYPES[weight.entries[0].dtype]).tobytes())
                    yield
        finally:
            pool.shutdown(cancel_futures=True)


def _point(entry: Entry, location: str, offset: int, length: int) -> None:
    for initializer in entry.initializers:
        initializer.data_location = TensorProto.EXTERNAL
        del initializer.external_data[:]
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            initializer.external_data.add(key=key, value=str(value))


def _plan(weights: list[StoredWeight], settings: dict[str, str]) -> tuple[bytes, list[int], int]:
    """Return the header of a safetensors file for `weights`, each weight's offset in the file, and the file's size."""
    entries: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "producer": "fluxonnx",
            **settings,
            # So that a file made from another checkpoint is told from this one by its header alone.
            "source": ",".join(fingerprint(file) for file in sorted({weight.source.file for weight in weights})),
        }
    }
    end = 0
    starts = []
    for weight in weights:
        starts.append(end)
        for entry in weight.entries:
            offsets = [end, end + entry.nbytes]
            end += entry.nbytes
            entries[entry.initializer.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
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
    # onnxruntime and onnx.checker refuse external data behind symbolic links or outside the graph's folder, the latter
    # also what has several names.
    parts = [root / Path(*file.relative_to(root).parts[: i + 1]) for i in range(len(file.relative_to(root).parts))]
    link = next((part for part in parts if part.is_symlink()), None)
    if link is not None:
        raise CheckpointError(
            f"{link} is a symbolic link (a hub cache?), which ONNX can't use for weights: make a self-contained copy "
            "with -o DIR, or download with `hf download ... --local-dir DIR`"
        )
    if file.stat().st_nlink > 1:
        raise CheckpointError(
            f"{file} has several names (hard links), which ONNX refuses for weights: make a self-contained copy with "
            "-o DIR"
        )


def copy_model(
    checkpoint: Checkpoint, output: Path, say: Callable[[str, int, int], None], with_weights: bool = True
) -> Checkpoint:
    """Copy a model's files (links resolved) so that `output` depends on nothing else; files there already are kept.

    Without weights it is the configs and the tokenizer only, for a build that has weight files of its own.

    Raises:
        CheckpointError: `output` holds another model.
        ExportError: There is not enough space, or the folder can't be made.
    """
    if output.exists() and output.resolve() == checkpoint.root.resolve():
        return checkpoint
    if not output.parent.is_dir():
        raise ExportError(f"folder {output.parent} does not exist: create it, or choose another -o")
    files = [file for file in checkpoint.files() if with_weights or ".safetensors" not in file.suffixes]
    for file in files:
        if file.suffix == ".safetensors":
            read_header(file)  # a corrupt file is refused before 16 GB are copied
    output.mkdir(exist_ok=True)
    pending = [file for file in files if not _same(file, output / file.relative_to(checkpoint.root))]
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
    return Checkpoint(output, checkpoint.transformer)


def _same(source: Path, target: Path) -> bool:
    if not target.is_file() or source.stat().st_size != target.stat().st_size:
        return False
    if source.suffix == ".safetensors":
        return fingerprint(source) == fingerprint(target)
    return np.array_equal(np.fromfile(source, np.uint8), np.fromfile(target, np.uint8))
