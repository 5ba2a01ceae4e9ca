"""Whether a file is still the one that it was: digests that are cheap also for gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from fluxonnx.checkpoint.config import read_json
from fluxonnx.checkpoint.reading import read_bounded
from fluxonnx.checkpoint.safetensors import fingerprint
from fluxonnx.errors import CheckpointError

# Files of at most this many bytes are read whole, in about 10 ms; of larger ones this many blocks are.
WHOLE = 1 << 24
SAMPLES = 512

# Entries of a config file that say nothing about what is computed.
IRRELEVANT = ("transformers_version", "torch_dtype", "dtype")

# A file may change twice within the resolution of its time stamp: younger ones are always read again.
SETTLED_AFTER_NS = 2_000_000_000


def content_digest(path: Path) -> str:
    """Return a digest of a file's size and of its content, or of its header and samples if it is large.

    A digest is remembered for as long as the file's time stamp and size stay.

    Raises:
        CheckpointError: The file can't be read.
    """
    stamp = _stamp(path)
    if time.time_ns() - stamp[-1] < SETTLED_AFTER_NS:
        return _digest(path, stamp[2])
    return _remembered(path.absolute(), stamp)


def _stamp(path: Path) -> tuple[int, int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=256)
def _remembered(path: Path, stamp: tuple[int, int, int, int]) -> str:
    return _digest(path, stamp[2])


def _digest(path: Path, size: int) -> str:
    if size > WHOLE:
        return f"samples:{fingerprint(path, SAMPLES)}"
    try:
        return f"sha256:{hashlib.sha256(read_bounded(path)).hexdigest()}"
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None


def config_digest(path: Path) -> str:
    """Return a digest of what a config file says; how it is written does not matter.

    Raises:
        CheckpointError: The file can't be read or is not a JSON object.
    """
    values = {k: v for k, v in read_json(path).items() if not k.startswith("_") and k not in IRRELEVANT}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextmanager
def unchanged(files: dict[Path, str]) -> Iterator[None]:
    """Make sure that files have their `content_digest` before the block, and are not replaced during it.

    Raises:
        CheckpointError: They are others.
    """
    stamps = {}
    for path, digest in files.items():
        stamps[path] = _stamp(path)
        if content_digest(path) != digest:
            raise CheckpointError(f"{os.fspath(path)} was exported again since the model was opened: open it anew")
    yield
    for path, stamp in stamps.items():
        if _stamp(path) != stamp:
            raise CheckpointError(f"{os.fspath(path)} was exported again while it was opened: open the model anew")
