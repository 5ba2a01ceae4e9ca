"""Self-contained copies: whole, resumable, and never over another model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import pytest

import fluxonnx
from fluxonnx.checkpoint.manifest import read_manifest
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


@pytest.mark.parametrize(
    ("precision", "flavour", "dtype"),
    [("fp32", "ort", "bf16"), ("fp32", "ort", "fp32"), ("fp16", "portable", "bf16"), ("int4", "portable", "bf16")],
)
def test_copy_has_no_weights_that_no_graph_reads(checkpoints, tmp_path, precision, flavour, dtype):
    """Every file of weights is of the build; the copy draws what the source draws, and stays current."""
    source, copy = checkpoints.exported(Case("tiny-random", dtype), precision, flavour), tmp_path / "copy"
    export(checkpoints.get(Case("tiny-random", dtype)), copy, precision=precision, flavour=flavour)
    (build,) = read_manifest(copy).builds.values()
    own = {name for component in build.components.values() for name in component.weights}
    assert {name for name in files(copy) if "safetensors" in name} == own
    pictures = []
    for root in (source, copy):
        with fluxonnx.load(root, precision=precision, flavour=flavour) as flux:
            pictures.append(flux.generate("x", 64, 64, steps=1, seed=1).tobytes())
    assert pictures[0] == pictures[1]
    assert all(report.seconds is None for report in export(source, copy, precision=precision, flavour=flavour))


def test_copy_of_two_precisions_has_the_weights_that_are_read(checkpoints, tmp_path):
    export(checkpoints.get(CASE), tmp_path / "copy", precision="fp32", text_encoder_precision="bf16")
    weights = {name for name in files(tmp_path / "copy") if name.endswith(".safetensors")}
    assert {Path(name).parent.name for name in weights if "fp32" not in name} == {"text_encoder"}
    with fluxonnx.load(tmp_path / "copy") as flux:
        info = flux.generate("x", 64, 64, steps=1, seed=1).info
    assert (info["precision"], info["text_encoder_precision"]) == ("fp32", "bf16")
