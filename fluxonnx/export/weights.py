"""Where the weights of a graph lie: in the checkpoint's files, or in a safetensors file of the build."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from fluxonnx.checkpoint.digests import content_digest
from fluxonnx.checkpoint.safetensors import DTYPES, Tensor, read_header
from fluxonnx.errors import ExportError
from fluxonnx.export import links
from fluxonnx.export.graph import Graph
from fluxonnx.export.initializers import Entry, StoredWeight
from fluxonnx.files import probe, resumable_write
from fluxonnx.machine import usable_cores

# Tensors that are encoded at a time, each by a thread.
WORKERS = min(usable_cores(), 4)

# Bytes of a safetensors header, at most: without its entries, but with what it is padded to; and of an entry, without
# its name.
HEADER, ENTRY = 8192, 128

# Values that are converted at a time, so that memory does not grow with the tensor.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Stored:
    """The weight files of a build, relative to its folder; `bytes_written` leaves out what was there already."""

    names: list[str]
    bytes_written: int = 0


def weight_file(component: str, folder: str, label: str) -> str:
    """Name a component's weight file: transformer/fp32.safetensors, vae/decoder.fp32.safetensors."""
    part = component.removeprefix(folder).lstrip("_")
    return f"{folder}/{'.'.join(filter(None, (part, label, 'safetensors')))}"


def check_places(graph: Graph, root: Path, name: str) -> None:
    """Check that the weights of a graph can be written where they will be.

    Args:
        graph: The graph.
        root: The folder that it will be in.
        name: The weight file that may be written, relative to `root`.

    Raises:
        OSError: The file can't be written.
    """
    path = root / _reachable(root, name)
    writes = any(links.stays(weight, root) is None for weight in graph.weights)
    if writes and path.parent.is_dir() and not path.exists():
        probe(path)


def place(
    graph: Graph,
    root: Path,
    name: str,
    settings: dict[str, str],
    say: Callable[[int, int], None],
    reuse: Collection[str] = (),
    resume: bool = True,
    shard_size: int | None = None,
    link: bool = True,
    shared: Mapping[str, Tensor] = MappingProxyType({}),
) -> Stored:
    """Write the weights that can't stay in the checkpoint, and point every initializer at its bytes.

    Args:
        graph: The graph.
        root: The folder that the graph will be in.
        name: The weight file, relative to `root`; of several, each has its number in its name.
        settings: Everything that the bytes depend on besides the checkpoint; stored in the file's header.
        say: Called with the bytes written and the total.
        reuse: Files that are known to be whole and of the same weights; one of these is kept if it has the same header.
        resume: Whether a file that an interrupted run left is completed.
        shard_size: The most bytes of a file, but for a single weight that is larger; None for one file.
        link: Whether files elsewhere, and files behind symbolic links, may become hard links beside the graph.
        shared: Of `stored_in`: what another graph of the build has stored of the same weights, which is pointed at.

    Returns:
        The build's weight files; none if all weights stay in the checkpoint.

    Raises:
        ExportError: There is not enough space.
    """
    name = _reachable(root, name)
    made: list[StoredWeight] = []
    used: set[Path] = set()
    linked: dict[Path, str | None] = {}
    for weight in graph.weights:
        where = links.stays(weight, root)
        if where is None and link and weight.in_place:
            source = weight.source.file
            if source not in linked:
                linked[source] = links.hard_link(source, root, name)
            where = linked[source]
        if where is not None:
            weight.entries[0].point(where, weight.source.offset)
        elif all(_is_in(shared, entry) for entry in weight.entries):
            for entry in weight.entries:
                tensor = shared[entry.initializer.name]
                entry.point(tensor.file.relative_to(root).as_posix(), tensor.offset)
                used.add(tensor.file)
        else:
            made.append(weight)
    shards = _shards(made, shard_size)
    plans = [_plan(shard, settings) for shard in shards]
    total, before, written = sum(size for _, _, size in plans), 0, 0
    names = sorted(where for where in linked.values() if where is not None)
    names += sorted(file.relative_to(root).as_posix() for file in used)
    for i, (shard, (header, starts, size)) in enumerate(zip(shards, plans, strict=True)):
        file_name = name if len(shards) == 1 else _shard_name(name, i, len(shards))
        for weight, start in zip(shard, starts, strict=True):
            for entry in weight.entries:
                entry.point(file_name, start)
                start += entry.nbytes
        path = root / file_name
        names.append(file_name)
        if file_name in reuse and path.is_file() and path.stat().st_size == size and _begins_with(path, header):
            before += size
            continue
        path.parent.mkdir(exist_ok=True)
        with resumable_write(path, header, resume) as file:
            done = file.tell()
            require_space(root, total - before - done, name)
            whole = sum(end <= done for end in [*starts[1:], size])
            file.seek(starts[whole] if whole < len(shard) else size)
            for _ in _written(shard[whole:], file):
                say(before + file.tell(), total)
        written += size
        before += size
    return Stored(names, written)


def stored_in(root: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Return what weight files of a build hold, by the names of initializers."""
    return {name: tensor for file in names for name, tensor in read_header(root / file).items()}


def _is_in(shared: Mapping[str, Tensor], entry: Entry) -> bool:
    found = shared.get(entry.initializer.name)
    return found is not None and (found.dtype, found.shape) == (entry.dtype, tuple(entry.shape))


def _shards(weights: list[StoredWeight], most: int | None) -> list[list[StoredWeight]]:
    """Divide weights, in their order, into as few files of at most `most` bytes as that allows."""
    shards: list[list[StoredWeight]] = []
    room = 0
    for weight in weights:
        size = sum(entry.nbytes + len(entry.initializer.name) + ENTRY for entry in weight.entries)
        if not shards or (most is not None and size > room):
            shards.append([])
            room = (most or 0) - HEADER
        shards[-1].append(weight)
        room -= size
    return shards


def _shard_name(name: str, number: int, count: int) -> str:
    """Name one of several files as the hub does: transformer/int8-00001-of-00003.safetensors."""
    stem = name.removesuffix(".safetensors")
    return f"{stem}-{number + 1:05}-of-{count:05}.safetensors"


def _reachable(root: Path, name: str) -> str:
    """Return where a weight file is written: beside the graph if its folder is a link, behind which ONNX refuses it."""
    return name.replace("/", ".") if (root / name).parent.is_symlink() else name


def _begins_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _written(weights: list[StoredWeight], file: BinaryIO) -> Iterator[None]:
    """Write weights in order and yield after each piece; weights with an encoder are encoded ahead, in parallel."""
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
                        file.write(_bytes(array))
                    yield
                    continue
                for piece in weight.source.pieces(CHUNK):
                    file.write(_bytes(np.asarray(piece, DTYPES[weight.entries[0].dtype])))
                    yield
        finally:
            pool.shutdown(cancel_futures=True)


def _bytes(array: np.ndarray) -> memoryview:
    """Return an array's bytes in order, without a copy where they lie so already."""
    return np.ascontiguousarray(array).view(np.uint8).data


def _plan(weights: list[StoredWeight], settings: dict[str, str]) -> tuple[bytes, list[int], int]:
    """Return the header of a safetensors file for `weights`, each weight's offset in the file, and the file's size."""
    entries: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "producer": "fluxonnx",
            **settings,
            # Tells files of different checkpoints apart by their headers.
            "source": ",".join(content_digest(file) for file in sorted({weight.source.file for weight in weights})),
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
    """Check that there is space before writing starts.

    Raises:
        ExportError: Less than `size` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ExportError(
            f"{what} needs {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {folder}: free some space"
        )
