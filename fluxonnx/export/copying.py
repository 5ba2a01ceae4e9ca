"""Self-contained copies of a model directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from fluxonnx.checkpoint.digests import content_digest
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.reading import check_readable
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.contract import COMPONENT_CLASSES, open_checkpoint
from fluxonnx.errors import ExportError
from fluxonnx.export.weights import require_space
from fluxonnx.files import atomic_write


def prepare_copy(checkpoint: Checkpoint, output: Path, weights_of: Collection[str]) -> list[Path]:
    """Make the folder for a copy, and return the files to copy.

    Of the folders in `weights_of` that is everything; of others only configs and the tokenizer, for a build that has
    weight files of its own.

    Raises:
        CheckpointError: A weight file is corrupt.
        ExportError: The folder can't be made.
    """
    if not output.parent.is_dir():
        raise ExportError(f"folder {output.parent} does not exist: create it, or choose another -o")
    files = [
        file
        for file in checkpoint.files(COMPONENT_CLASSES)
        if file.parent.name in weights_of or ".safetensors" not in file.suffixes
    ]
    for file in files:  # what can't be copied is refused before 16 GB are
        if file.suffix == ".safetensors":
            read_header(file)
        else:
            check_readable(file)
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output} is not a folder: choose another -o")
    output.mkdir(exist_ok=True)
    return files


def copy_model(
    checkpoint: Checkpoint, files: list[Path], output: Path, say: Callable[[str, int, int], None]
) -> Checkpoint:
    """Copy a model's files, links resolved, so that `output` depends on nothing else; equal files there are kept.

    Raises:
        CheckpointError: `output` holds another model.
        ExportError: There is not enough space.
    """
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
        with atomic_write(target) as temporary:
            shutil.copyfile(file, temporary)
        done += file.stat().st_size
        say("copy", done, total)
    copied = open_checkpoint(output, **checkpoint.parts)
    copied.may_link = False  # what depends on nothing else has bytes of its own
    return copied


def _same(source: Path, target: Path) -> bool:
    if not target.is_file() or source.stat().st_size != target.stat().st_size:
        return False
    if source.suffix == ".safetensors":
        return content_digest(source) == content_digest(target)
    return np.array_equal(np.fromfile(source, np.uint8), np.fromfile(target, np.uint8))
