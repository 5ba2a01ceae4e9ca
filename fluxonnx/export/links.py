"""Weights behind symbolic links, under several names, and elsewhere: what a graph can point at.

onnxruntime and ONNX refuse external data that lies outside the graph's folder once links are followed: all of a hub
cache's snapshot, whose files are links to blobs. onnxruntime takes hard links, which cost nothing and are made wherever
both names are on one disk; elsewhere weights are copied. ONNX's own checker and loader also refuse hard links: a copy
by `export -o` has none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import onnx

from fluxonnx.errors import ExportError
from fluxonnx.export.graph import Graph
from fluxonnx.export.initializers import StoredWeight
from fluxonnx.files import temporary_file


def stays(weight: StoredWeight, root: Path) -> str | None:
    """Return where a weight lies, relative to the graph's folder, if a graph can point at it there."""
    file = weight.source.file
    if not weight.in_place or not file.is_relative_to(root) or _is_behind_link(root, file):
        return None
    return file.relative_to(root).as_posix()


def _is_behind_link(root: Path, file: Path) -> bool:
    parts = file.relative_to(root).parts
    return any((root / Path(*parts[: i + 1])).is_symlink() for i in range(len(parts)))


def hard_link(file: Path, root: Path, name: str) -> str | None:
    """Give a file a second name beside the build's weight file; None where that can't be.

    Args:
        file: The file; links are followed.
        root: The folder of the graph.
        name: The build's weight file, relative to `root`.

    Returns:
        The second name, relative to `root`.
    """
    own = PurePosixPath(name)
    # a hub cache's blobs are named by digests, and people know the link
    target = own.with_name(f"{own.name.removesuffix('.safetensors')}.{file.name}")
    path, real = root / target, file.resolve()
    with suppress(OSError):
        if path.is_file() and path.samefile(real) and not path.is_symlink():
            return target.as_posix()
        path.parent.mkdir(exist_ok=True)
        with temporary_file(path, f".{path.name}.") as temporary:
            temporary.unlink()
            os.link(real, temporary)
            os.replace(temporary, path)
        return target.as_posix()
    return None


def notice(graphs: Iterable[Graph], root: Path, link: bool) -> str | None:
    """Return a line about weights that can't be pointed at where they lie; None if there are none.

    Args:
        graphs: The graphs.
        root: The folder that they will be in.
        link: Whether hard links may be made.
    """
    files = {w.source.file for graph in graphs for w in graph.weights if w.in_place and stays(w, root) is None}
    if not files or not link:
        return None
    size = sum(file.stat().st_size for file in files) / 1e9
    first = sorted(files)[0]
    what = "behind a link" if first.is_relative_to(root) else "outside the model directory"
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    lying = f"{first}{more} lie{'' if more else 's'} {what}"
    disks = {file.stat().st_dev for file in files}
    if disks == {root.stat().st_dev}:
        return f"{lying}: the build gets hard links to the same bytes ({size:.1f} GB)"
    return f"{lying}, on another disk: {size:.1f} GB are copied into the build"


def check(model: onnx.ModelProto, path: Path, name: str) -> None:
    """Let ONNX's checker look at a graph that was saved at `path`; it refuses hard links, which it is not shown.

    Raises:
        ExportError: It finds a mistake; `name` is what the message calls the graph.
    """
    without = _without_hard_links(model, path.parent)
    if without is not None:
        onnx.save(without, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"{name} can't be used by ONNX ({reason}): make a copy with -o DIR") from error
    if without is not None:
        onnx.save(model, path)


def _without_hard_links(model: onnx.ModelProto, root: Path) -> onnx.ModelProto | None:
    """Return a graph without those weights that ONNX's checker refuses as hard links; None if there are none.

    Such weights are inputs there, of the same types.
    """
    named = {name for tensor in model.graph.initializer for name in _locations(tensor)}
    if all((root / name).stat().st_nlink == 1 for name in named if (root / name).is_file()):
        return None
    found = onnx.ModelProto()
    found.CopyFrom(model)
    kept = []
    for tensor in found.graph.initializer:
        if any((root / name).stat().st_nlink > 1 for name in _locations(tensor)):
            found.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            kept.append(tensor)
    del found.graph.initializer[:]
    found.graph.initializer.extend(kept)
    return found


def _locations(tensor: onnx.TensorProto) -> Iterator[str]:
    return (entry.value for entry in tensor.external_data if entry.key == "location")
