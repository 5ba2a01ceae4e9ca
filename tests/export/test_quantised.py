"""Quantised builds: close to the checkpoint, the same in every form, whole after an interruption."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import fluxonnx
from fluxonnx.checkpoint.manifest import graph_file, read_manifest
from fluxonnx.contract import COMPONENTS
from fluxonnx.errors import CheckpointError, ExportError, UsageError
from fluxonnx.export import export
from fluxonnx.export.precisions import Int8
from fluxonnx.machine import has_exact_int8_dot
from tests.conformance import openvino
from tests.support import Case, aged, golden_inputs, operators, relative_error, run_graph

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
QUANTISED = [(name, flavour) for name in ("int8", "int4") for flavour in ("ort", "portable")]

# Relative L2 against the same graph with the checkpoint's weights. The rounding of weights alone is 0.7 % for int8 (a
# step of 1/127 of the largest of 96) and 8 % for int4 in blocks of 32; activations and depth add to it.
TOLERANCE = {"int8": 0.02, "int4": 0.12}


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def copy(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))


def export_int4(root: Path, flavour: str = "ort") -> Path:
    export(root, precision="int4", flavour=flavour, block=32)  # rows of 48 and 96 are no multiples of 64
    return root


@pytest.fixture(scope="module")
def built(checkpoints, tmp_path_factory) -> Path:
    """One model directory with all builds side by side."""
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path_factory.mktemp("built") / "model"))
    export(root)
    for flavour in ("ort", "portable"):
        export(root, precision="int8", flavour=flavour)
        export_int4(root, flavour)
    return root


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
@pytest.mark.parametrize(("name", "flavour"), QUANTISED)
def test_is_close_to_the_checkpoint(built, component, name, flavour):
    expected = run_graph(built, component, "bf16")
    assert 0 < relative_error(run_graph(built, component, name, flavour), expected) < TOLERANCE[name]


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_flavours_round_alike(built, component):
    """Integers and scales are the same; only the order of float32 operations differs."""
    assert relative_error(run_graph(built, component, "int8"), run_graph(built, component, "int8", "portable")) < 1e-3
    # MatMulNBits also rounds activations
    assert relative_error(run_graph(built, component, "int4"), run_graph(built, component, "int4", "portable")) < 0.02


@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder", "conditioning"])
def test_what_is_not_quantised_is_the_same(built, component):
    np.testing.assert_array_equal(run_graph(built, component, "int8"), run_graph(built, component, "bf16"))


def test_portable_is_plain_onnx(built):
    for name, opset in (("int8", 17), ("int4", 21)):
        for component in COMPONENTS:
            model = onnx.load(built / graph_file(component, name, "portable"), load_external_data=False)
            assert [(item.domain, item.version) for item in model.opset_import] == [("", opset)]
    assert operators(built, "transformer", "int8", "portable")["MatMulInteger"] == 40
    # a linear of the last block is in three parts
    assert operators(built, "transformer", "int4", "portable")["DequantizeLinear"] == 30


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_openvino(built, name, component):
    pytest.importorskip("openvino")
    inputs = golden_inputs(component)
    found = openvino.load(built / graph_file(component, name, "portable"), inputs)(inputs)[0]
    # it may round activations otherwise, but the weights are the same
    assert relative_error(found, run_graph(built, component, name, "portable")) < 0.02


def test_kept_layers(copy, built):
    expected = run_graph(built, "transformer", "bf16")
    with_all = relative_error(run_graph(built, "transformer", "int8"), expected)
    export(copy, precision="int8", keep=r"single_.*to_out|ff\.", components=["transformer"])
    assert operators(copy, "transformer", "int8")["MatMulIntegerToFloat"] == 40 - 2 - 6
    assert relative_error(run_graph(copy, "transformer", "int8"), expected) < with_all
    export(copy, precision="int8", keep=".", components=["transformer"], force=True)
    # the modulations are multiplied by slices, for which some processors have a kernel that sums in another order
    assert relative_error(run_graph(copy, "transformer", "int8"), expected) < 1e-6


def test_rows_that_are_no_whole_blocks_are_kept(copy):
    """In rows of 96 there are no blocks of 128; only the two projections out of the single blocks have 384."""
    export(copy, precision="int4", block=128, components=["transformer"])
    assert operators(copy, "transformer", "int4")["MatMulNBits"] == 2


def test_other_settings_need_force(copy):
    export(copy, precision="int8")
    with pytest.raises(ExportError, match=r"other settings.*--force"):
        export(copy, precision="int8", keep="ff")
    export(copy, precision="int8", keep="ff", force=True)
    assert read_manifest(copy).builds["int8"].settings["keep"] == "ff"


def test_loading_a_stale_build_keeps_its_settings(copy):
    export(copy, precision="int4", block=32, keep="ff")
    aged(copy)
    fluxonnx.load(copy, precision="int4").close()
    build = read_manifest(copy).builds["int4"]
    assert (build.settings["block"], build.settings["keep"]) == ("32", "ff")
    assert all(component.graph_format > 0 for component in build.components.values())


def test_loading_adds_only_what_is_missing(copy):
    """The finished components of an interrupted export are kept; a build for another processor is made anew."""
    export(copy, precision="int8", components=["text_encoder", "transformer"])
    before = {
        name: content for name, content in files(copy).items() if name.endswith((".int8.onnx", "int8.safetensors"))
    }
    stamps = {name: (copy / name).stat().st_mtime_ns for name in before}
    fluxonnx.load(copy, precision="int8").close()
    assert stamps == {name: (copy / name).stat().st_mtime_ns for name in before}

    export(copy, precision=Int8(saturating=has_exact_int8_dot()), force=True)
    elsewhere = read_manifest(copy).builds["int8"].settings["products"]
    (copy / "vae_decoder.int8.onnx").unlink()
    fluxonnx.load(copy, precision="int8").close()
    build = read_manifest(copy).builds["int8"]
    assert build.settings["products"] != elsewhere
    assert set(build.components) == set(COMPONENTS)


class Stop(Exception):
    pass


def test_interrupted_export_goes_on(copy, built):
    """Weights that were written are not made again, and the file is the same as without the interruption."""
    written: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        written.append(done)
        if total and len([n for n in written if n]) == 12:
            raise Stop

    with pytest.raises(Stop):
        export(copy, precision="int8", components=["transformer"], progress=stop)
    assert not (copy / "transformer/int8.safetensors").exists()
    rest: list[int] = []
    export(copy, precision="int8", components=["transformer"], progress=lambda what, done, total: rest.append(done))
    assert min(n for n in rest if n) > written[-1]
    expected = files(built)
    for name, content in files(copy).items():
        assert ".partial" not in name
        if name.startswith("transformer"):
            assert content == expected[name], name


def test_partial_file_of_other_settings_is_not_used(copy, built):
    def stop(what: str, done: int, total: int) -> None:
        if done:
            raise Stop

    with pytest.raises(Stop):
        export(copy, precision="int8", keep="ff", components=["transformer"], progress=stop)
    export(copy, precision="int8", components=["transformer"])
    assert (copy / "transformer/int8.safetensors").read_bytes() == files(built)["transformer/int8.safetensors"]


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
def test_copy_has_no_other_weights(checkpoints, tmp_path, name):
    """-o makes a folder that is small, needs nothing else, and is used without --precision."""
    source = shutil.copytree(checkpoints.get(CASE), tmp_path / "source")
    export(source, precision=name)
    with fluxonnx.load(source, precision=name) as flux:
        expected = flux.generate("x", 64, 64, seed=1)
    export(source, tmp_path / "copy", precision=name)
    shutil.rmtree(source)
    assert {Path(file).stem for file in files(tmp_path / "copy") if file.endswith(".safetensors")} == {
        name,
        f"encoder.{name}",
        f"decoder.{name}",
    }
    with fluxonnx.load(tmp_path / "copy") as flux:
        image = flux.generate("x", 64, 64, seed=1)
    assert image.info["precision"] == name
    assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
def test_self_contained_builds_survive_an_upgrade(copy, tmp_path, name):
    """An old format still runs where it can't be exported again; a damaged build says what makes it again."""
    target = tmp_path / "copy"
    export(copy, target, precision=name)
    with fluxonnx.load(target) as flux:
        expected = flux.generate("x", 64, 64, steps=1, seed=1)
    aged(target)
    for precision in (None, name, "auto"):
        with fluxonnx.load(target, precision=precision) as flux:
            assert flux.generate("x", 64, 64, steps=1, seed=1).tobytes() == expected.tobytes()
    (target / f"vae_decoder.{name}.onnx").unlink()
    command = rf"fluxonnx export -d CHECKPOINT -o \S+ --precision {name}$"
    with pytest.raises(CheckpointError, match=command):
        fluxonnx.load(target, precision=name)


def test_checkpoint_may_be_deleted_after_quantising(copy):
    export(copy, precision="int8")
    for file in copy.glob("*/*.safetensors"):
        if "int8" not in file.name:
            file.unlink()
    with fluxonnx.load(copy) as flux:
        assert flux.generate("x", 64, 64, steps=1, seed=1).info["precision"] == "int8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4", "block": 48}, "--block 48 is out of range: choose one of 32, 64, 128"),
        ({"precision": "int8", "block": 32}, "--block is for int4"),
        ({"precision": "int4", "rotate": True}, "--rotate is for int8"),
        ({"precision": "bf16", "keep": "ff"}, "--keep is for int8 and int4"),
        ({"precision": "int8", "keep": "("}, "not a regular expression"),
        ({"precision": "int4", "flavour": "portable", "opset": 20}, "int4 portable graphs can be 21 to 21"),
        ({"precision": "int3"}, "choose one of bf16, fp32, fp16, bf16-native, int8, int4"),
    ],
)
def test_impossible_options(copy, options, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        export(copy, **options)
