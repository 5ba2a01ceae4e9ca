"""The manifest's sizes, from which the runtime computes shapes, are those of the graphs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

import fluxonnx
from fluxonnx.checkpoint.graphs import graph_architecture
from fluxonnx.checkpoint.manifest import FILE_NAME
from fluxonnx.contract import COMPONENTS
from fluxonnx.errors import CheckpointError
from tests.support import Case

CASE = Case("odd-heads")


@pytest.fixture
def model(checkpoints, tmp_path) -> Path:
    """A built model whose small files can be changed."""
    return Path(shutil.copytree(checkpoints.exported(CASE), tmp_path / "model"))


@pytest.mark.parametrize("component", COMPONENTS)
def test_read_without_a_library(checkpoints, component):
    path = checkpoints.exported(CASE) / f"{component}.onnx"
    properties = onnx.load(path, load_external_data=False).metadata_props
    expected = json.loads(next(item.value for item in properties if item.key == "architecture"))
    assert graph_architecture(path) == expected
    assert expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x0a\x0carchitecture\x12",
        b"\x0a\x0carchitecture\x12\x05{",
        b"\x0a\x0carchitecture\x12" + b"\xff" * 20,
        b"\x0a\x0carchitecture\x12\x02[]",
        b"\x0a\x0carchitecture\x12\xff\x01" + b"[" * 255,
    ],
)
def test_graphs_that_say_nothing(tmp_path, content):
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    assert graph_architecture(path) == {}


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"vae.latent_channels": 2, "transformer.in_channels": 2}, "(vae.latent|transformer.in)_channels is"),
        ({"transformer.rope_theta": 500.0}, "transformer.rope_theta is 500.0, but conditioning.onnx was made for 2000"),
        ({"text_encoder.hidden": 2, "transformer.text_dim": 2}, "text_encoder.hidden"),
    ],
)
def test_sizes_that_were_changed_alike(model, fails, changes, pattern):
    path = model / FILE_NAME
    manifest = json.loads(path.read_text())
    for name, factor in changes.items():
        part, key = name.split(".")
        sizes = manifest["architecture"][part]
        sizes[key] = factor if isinstance(factor, float) else sizes[key] * factor
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=pattern):
        fluxonnx.load(model)
    fails(1, rf"{pattern}.*: run fluxonnx export -d {model} --precision bf16 --force",
          "generate", "-q", "-d", model, "-p", "x")  # fmt: skip
