"""Where the external data of a graph lies, and whether it is all there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import TensorProto

from fluxonnx.checkpoint.digests import content_digest
from fluxonnx.checkpoint.manifest import FILE_NAME, Component, read_manifest
from fluxonnx.checkpoint.reading import exists, is_file, shown
from fluxonnx.checkpoint.safetensors import fingerprint
from fluxonnx.errors import CheckpointError

# Bits of a value. Source: TensorProto.DataType, onnx.proto.
BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 32),
    **dict.fromkeys((TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT64, TensorProto.COMPLEX64), 64),
    **dict.fromkeys((TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT16, TensorProto.UINT16), 16),
    **dict.fromkeys((TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL), 8),
    **dict.fromkeys(
        (
            TensorProto.FLOAT8E4M3FN,
            TensorProto.FLOAT8E4M3FNUZ,
            TensorProto.FLOAT8E5M2,
            TensorProto.FLOAT8E5M2FNUZ,
        ),
        8,
    ),
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4), 4),
    TensorProto.COMPLEX128: 128,
}


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in a file beside the graph; `length` None for all that follows."""

    location: str
    offset: int
    length: int | None


@dataclass(frozen=True)
class ExternalFile:
    """A file that tensors of a graph lie in.

    Attributes:
        location: Its name, relative to the graph's folder.
        tensors: How many tensors lie in it.
        bytes: How many of its bytes they are; those that several tensors share count once.
        file_bytes: Its size; None if it is not there.
        digest: Whether it is as it was when the graph was exported; None if nothing says so.
        problem: What is wrong with it, and what to do; None if nothing is.
    """

    location: str
    tensors: int
    bytes: int
    file_bytes: int | None
    digest: bool | None
    problem: str | None


def needed_bytes(tensor: onnx.TensorProto) -> int | None:
    """Return how many bytes the values of a tensor take; None for texts and types of later versions."""
    bits = BITS.get(tensor.data_type)
    return None if bits is None else (math.prod(tensor.dims) * bits + 7) // 8


def place(tensor: onnx.TensorProto) -> Place:
    """Return where the bytes of a tensor lie.

    Raises:
        CheckpointError: The entry makes no sense.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries["length"]) if entries.get("length") else needed_bytes(tensor)
    except ValueError:
        raise CheckpointError(f"{shown(tensor.name)}: offset or length of its external data is no number") from None
    if not location:
        raise CheckpointError(f"{shown(tensor.name)}: its external data have no location")
    outside = PureWindowsPath(location).drive or PurePosixPath(location).is_absolute()
    if outside or "\0" in location or ".." in PureWindowsPath(location).parts:
        raise CheckpointError(
            f"{shown(tensor.name)}: its external data lie at {shown(location)}, outside the graph's folder, where no "
            "runtime reads them"
        )
    needed = needed_bytes(tensor)
    if offset < 0 or (length is not None and length < 0):
        raise CheckpointError(f"{shown(tensor.name)}: offset or length of its external data is negative")
    if length is not None and needed is not None and length != needed:
        raise CheckpointError(
            f"{shown(tensor.name)}: its external data have {length} bytes, but {list(tensor.dims)} needs {needed}"
        )
    return Place(location, offset, length)


def external_files(path: Path, tensors: Iterable[onnx.TensorProto]) -> tuple[list[ExternalFile], list[str]]:
    """Look at the files that the tensors of a graph lie in; their content is not read but for digests.

    Args:
        path: The graph's file.
        tensors: All tensors of the graph.

    Returns:
        The files, and what is wrong with entries that name no place.
    """
    places: dict[str, list[tuple[Place, str]]] = {}
    problems = []
    for tensor in tensors:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        try:
            found = place(tensor)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            places.setdefault(found.location, []).append((found, tensor.name))
    component, problem = recorded(path)
    if problem:
        problems.append(problem)
    return [_examined(path.parent, location, parts, component) for location, parts in places.items()], problems


def _examined(folder: Path, location: str, parts: list[tuple[Place, str]], component: Component | None) -> ExternalFile:
    file = folder / location
    used = sum(length or 0 for _, length in {(part.offset, part.length) for part, _ in parts})
    size: int | None = None
    digest: bool | None = None
    problem: str | None
    if not exists(file):
        problem = f"{file} is missing: bring it back, or export again with --force"
    elif not is_file(file):
        problem = f"{file} is not a regular file: bring the file back, or export again with --force"
    elif link := next((part for part in _parts(folder, location) if part.is_symlink()), None):
        problem = (
            f"{link} is a symbolic link, which ONNX can't use for weights: make a copy with `fluxonnx export -o DIR`"
        )
    else:
        size = file.stat().st_size
        problem = next(_beyond(file, size, parts), None)
        if problem is None:
            digest, problem = _compared(file, location, component)
    return ExternalFile(location, len(parts), used, size, digest, problem)


def _parts(folder: Path, location: str) -> Iterator[Path]:
    for name in PurePosixPath(location).parts:
        folder = folder / name
        yield folder


def _beyond(file: Path, size: int, parts: list[tuple[Place, str]]) -> Iterator[str]:
    for part, name in parts:
        end = part.offset + (part.length or 0)
        if end > size:
            yield f"{file} is truncated: {size} bytes, but {shown(name)} ends at {end}: download it, or export, again"


def _compared(file: Path, location: str, component: Component | None) -> tuple[bool | None, str | None]:
    if component is None:
        return None, None
    name = PurePosixPath(location).as_posix()
    digest = component.files.get(name) or component.sources.get(name)
    if digest is None:
        return None, None
    try:
        # the first versions recorded fingerprints, which have no prefix
        same = (content_digest(file) if ":" in digest else fingerprint(file)) == digest
    except CheckpointError as error:
        return None, str(error)
    if same:
        return True, None
    return False, f"{file} is not the file that the graph was exported with: export again with --force"


def recorded(path: Path) -> tuple[Component | None, str | None]:
    """Return what the manifest beside a graph says about it, and what is wrong with the manifest or the graph."""
    try:
        manifest = read_manifest(path.parent)
    except CheckpointError as error:
        return None, str(error)
    builds = manifest.builds.values() if manifest else ()
    for component in (found for build in builds for found in build.components.values()):
        if component.graph != path.name:
            continue
        if component.unfinished:
            return component, f"{path} was not finished: export again"
        digest = component.files.get(path.name)
        if digest is not None and content_digest(path) != digest:
            return component, f"{path} is not the graph that {FILE_NAME} tells of: export again with --force"
        return component, None
    return None, None
