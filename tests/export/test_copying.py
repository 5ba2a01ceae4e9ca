"""Self-contained copies: whole, resumable, and never over another model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import pytest

import fluxonnx
from fluxonnx.contract import COMPONENTS
from fluxonnx.errors import ExportError
from fluxonnx.export import export
from tests.support import Case, hub_cache

pytestmark = pytest.mark.slow

CASE = Case("one-double-three-single", shards=3)


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_self_contained_copy(checkpoints, tmp_path):
    """-o depends on nothing: it makes the same picture after the source is gone."""
    source = shutil.copytree(checkpoints.get(CASE), tmp_path / "source")
    export(source, tmp_path / "copy")
    with fluxonnx.load(source) as flux:
        expected = flux.generate("x", 64, 64, seed=1)
    shutil.rmtree(source)
    with fluxonnx.load(tmp_path / "copy") as flux:
        assert flux.generate("x", 64, 64, seed=1).tobytes() == expected.tobytes()


def test_copies_of_links_are_files(checkpoints, tmp_path):
    snapshot = hub_cache(checkpoints.get(CASE), tmp_path / "models--a--b")
    hard = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "hard", copy_function=os.link))
    for i, source in enumerate((snapshot, hard)):
        target = tmp_path / str(i)
        export(source, target)
        assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in target.rglob("*") if path.is_file())
        for name in COMPONENTS:
            onnx.checker.check_model(target / f"{name}.onnx")
        with fluxonnx.load(target) as flux:
            flux.generate("x", 64, 64, steps=1)


def test_copy_never_overwrites_another_model(checkpoints, tmp_path):
    other = shutil.copytree(checkpoints.get(Case("odd-heads")), tmp_path / "other")
    before = {name: (other / name).read_bytes() for name in files(other)}
    with pytest.raises(ExportError, match="exists and differs from"):
        export(checkpoints.get(CASE), other)
    assert {name: (other / name).read_bytes() for name in files(other)} == before


def test_copy_goes_on_where_it_was_stopped(checkpoints, tmp_path):
    """Files that are there already are not copied again."""
    export(checkpoints.get(CASE), tmp_path / "copy", components=["conditioning"])
    (tmp_path / "copy" / "vae" / "config.json").unlink()
    stamp = (tmp_path / "copy" / "model_index.json").stat().st_mtime_ns
    export(checkpoints.get(CASE), tmp_path / "copy")
    assert (tmp_path / "copy" / "vae" / "config.json").exists()
    assert (tmp_path / "copy" / "model_index.json").stat().st_mtime_ns == stamp


def test_output_whose_parent_does_not_exist(checkpoints, tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        export(checkpoints.get(CASE), tmp_path / "a" / "b")
