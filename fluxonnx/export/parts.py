"""Which parts of a model come from files of their own: what builds and graphs state of them, and what is told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.files import files_of
from fluxonnx.checkpoint.formats import unmarked
from fluxonnx.checkpoint.safetensors import fingerprint
from fluxonnx.contract import FOLDERS
from fluxonnx.export import links
from fluxonnx.export.components import Target
from fluxonnx.export.graph import Graph
from fluxonnx.export.precisions.blocks import described


def replaced_parts(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the settings of a build whose graphs have their weights from other files, by the graphs' names."""
    stated = {part: f"{as_text(file.name)} {_fingerprint(file)}" for part, file in checkpoint.parts.items()}
    return {name: stated[part] for name, part in FOLDERS.items() if part in stated and name != "conditioning"}


def _fingerprint(file: Path) -> str:
    """Return what tells a file, or an index and the files that it names, from others."""
    index, files = files_of(file)
    if index is None:
        return fingerprint(file)[:12]
    return hashlib.sha256("".join(map(fingerprint, files)).encode()).hexdigest()[:12]


def stated(checkpoint: Checkpoint, component: str) -> dict[str, str]:
    """Return the one of `replaced_parts` that a graph states: by the name of its part."""
    found = replaced_parts(checkpoint).get(component)
    return {FOLDERS[component]: found} if found else {}


def without_parts(settings: dict[str, str]) -> dict[str, str]:
    """Return the settings that all graphs of a build share; from which file a graph has its weights is its own."""
    return {key: value for key, value in settings.items() if key not in FOLDERS}


def notices(checkpoint: Checkpoint, root: Path, graphs: Mapping[str, Graph], target: Target) -> Iterator[str]:
    """Yield what a person has to know of the weights that graphs in `root` are made from."""
    if line := links.notice(graphs.values(), root, checkpoint.may_link):
        yield line
    for folder in sorted({FOLDERS[name] for name in graphs if name != "conditioning"}):
        tensors = checkpoint.tensors(folder)
        bits = getattr(target.precision, "bits", None)
        yield from filter(None, (unmarked(tensors), described(target.precision.name, bits, tensors)))


def as_text(name: str) -> str:
    """Return a file's name as graphs can hold it: bytes that are not UTF-8 are replaced."""
    return name.encode(errors="replace").decode()
