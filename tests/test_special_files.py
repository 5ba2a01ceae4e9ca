"""Pipes and folders in a model directory, where files belong: nothing hangs, and one line says what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import fluxonnx
from fluxonnx.checkpoint.manifest import FILE_NAME, read_manifest
from fluxonnx.errors import CheckpointError, ExportError
from fluxonnx.export import export
from tests.support import Case

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such files")]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_in_the_place_of_files(copy_of, make):
    """A pipe that nobody writes to would be waited for until the end of time."""
    root = copy_of(Case("odd-heads"))
    graph = root / "transformer.onnx"
    make(graph)
    with pytest.raises(ExportError, match=rf"{graph} exists and is not a graph: move it away"):
        export(root)
    assert not list(root.glob("*.tmp"))
    if make is Path.mkdir:
        graph.rmdir()
    else:
        graph.unlink()
    manifest = root / FILE_NAME
    make(manifest)
    for call in (fluxonnx.load, export):
        with pytest.raises(CheckpointError, match=rf"{manifest} can't be read"):
            call(root)
    if make is Path.mkdir:
        with pytest.raises(ExportError, match="Is a directory"):
            export(root, components=["conditioning"], force=True)
    else:
        with pytest.warns(UserWarning, match="was damaged"):
            export(root, components=["conditioning"], force=True)
        assert set(read_manifest(root).builds) == {"bf16"}
