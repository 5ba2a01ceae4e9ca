"""Quantised builds: close to the checkpoint, the same in every form, whole after an interruption."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

import fluxonnx
from fluxonnx.checkpoint import read_header
from fluxonnx.errors import ExportError, UsageError
from fluxonnx.export import export, exporter, int8, precision, quantise, weights
from fluxonnx.manifest import COMPONENTS, build_name, graph_file, read_manifest
from fluxonnx.runtime import session
from fluxonnx.runtime.session import Session, SessionOptions
from tests.conftest import Case
from tests.test_other_runtimes import inputs_of

CASE = Case("odd-heads")
QUANTISED = [(name, flavour) for name in ("int8", "int4") for flavour in ("ort", "portable")]

# Relative L2 against the same graph with the checkpoint's weights. The rounding of weights alone is 0.7 % for int8 (a
# step of 1/127 of the largest of 96) and 8 % for int4 in blocks of 32; activations and depth add to it.
TOLERANCE = {"int8": 0.02, "int4": 0.12}


def run(root: Path, component: str, name: str, flavour: str = "ort", **inputs: np.ndarray) -> np.ndarray:
    build = read_manifest(root).builds[build_name(name, flavour)]
    with Session(root / graph_file(component, name, flavour), component, SessionOptions(), build) as opened:
        return opened.run(**(inputs or inputs_of(component)))[0]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def operators(root: Path, component: str, name: str, flavour: str = "ort") -> Counter:
    model = onnx.load(root / graph_file(component, name, flavour), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


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
    expected = run(built, component, "bf16")
    assert 0 < distance(run(built, component, name, flavour), expected) < TOLERANCE[name]


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_flavours_round_alike(built, component):
    """Integers and scales are the same; only the order of float32 operations differs."""
    assert distance(run(built, component, "int8"), run(built, component, "int8", "portable")) < 1e-3
    # MatMulNBits also rounds activations
    assert distance(run(built, component, "int4"), run(built, component, "int4", "portable")) < 0.02


@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder", "conditioning"])
def test_what_is_not_quantised_is_the_same(built, component):
    np.testing.assert_array_equal(run(built, component, "int8"), run(built, component, "bf16"))


@pytest.mark.parametrize("exact", [True, False], ids=["VNNI", "no VNNI"])
def test_integers_suit_the_processor(copy, built, monkeypatch, exact):
    """Without VNNI, pairs of products must fit into 16 bits whatever the activations are."""
    monkeypatch.setattr(precision, "adds_int8_products_exactly", lambda: exact)
    export(copy, precision="int8", components=["transformer"], force=True)
    weights = [
        t.array().astype(int) for t in read_header(copy / "transformer/int8.safetensors").values() if t.dtype == "I8"
    ]
    worst = max(np.abs(w[0::2] + w[1::2]).max() for w in weights)
    levels = 127 if exact else precision.PAIRED_LEVELS
    assert (2 * levels * worst < 2**15) is not exact
    assert distance(run(copy, "transformer", "int8"), run(built, "transformer", "bf16")) < TOLERANCE["int8"]


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("packed", [True, False])
def test_paired_products_are_exact(tmp_path, rows, packed):
    """The worst activations there can be, in onnxruntime's own kernels, against integers in numpy."""
    rng = np.random.default_rng(0)
    save_file({"w": rng.standard_normal((96, 256)).astype(np.float32)}, tmp_path / "w.safetensors")
    source = read_header(tmp_path / "w.safetensors")["w"]
    levels = precision.PAIRED_LEVELS
    weights, _ = quantise.int8_columns(source, (2**15 - 1) // (2 * levels))
    # for each column some row that makes every product positive, or every product negative
    signs = [weights.T[:rows] > 0, weights.T[:rows] <= 0]
    for sign in signs:
        activations = np.where(sign, 2 * levels, 0).astype(np.uint8)
        assert (activations.astype(int) @ weights.astype(int)).max() > 2**15
        found = multiplied(activations, weights, levels, packed)
        np.testing.assert_array_equal(found, (activations.astype(int) - levels) @ weights.astype(int))


def multiplied(activations: np.ndarray, weights: np.ndarray, zero_point: int, packed: bool) -> np.ndarray:
    """MatMulInteger in onnxruntime."""
    node = onnx.helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, activations.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, None)],
        [onnx.numpy_helper.from_array(weights, "w"), onnx.numpy_helper.from_array(np.uint8(zero_point), "zero")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "0" if packed else "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": activations})[0]


def test_activations_are_rounded_once_for_all_linears_that_share_them(built):
    """Of the 12 linears of a double block, the three projections of each stream share their rows.

    Two of these linears and one of a single block have several products: halves of SwiGLU, and q, k and v. The last
    block computes k and v of all rows, and everything else of those of the picture, which it rounds again.
    """
    counts = operators(built, "transformer", "int8")
    double, single = 2, 2
    assert counts["MatMulIntegerToFloat"] == 14 * double + 6 * single
    assert counts["QuantizeLinear"] == 8 * double + 2 * single + 1


@pytest.mark.parametrize("name", ["odd-heads", "one-double-three-single"])
@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_runs_are_the_whole(checkpoints, tmp_path, monkeypatch, name, component, flavour):
    """Wide products are computed in runs of columns; neither integers nor scales depend on where they are cut."""
    root = Path(shutil.copytree(checkpoints.get(Case(name)), tmp_path / "model"))
    found = []
    monkeypatch.setattr(precision, "RUNS", 2)
    for widths in ((), (48, 32, 16)):
        monkeypatch.setattr(int8, "RUN_WIDTHS", widths)
        export(root, precision="int8", flavour=flavour, components=[component], force=True)
        found.append((run(root, component, "int8", flavour), operators(root, component, "int8", flavour)))
    (whole, few), (runs, many) = found
    assert many["MatMulIntegerToFloat"] + many["MatMulInteger"] > few["MatMulIntegerToFloat"] + few["MatMulInteger"]
    assert many["Transpose"] > few["Transpose"]
    assert distance(runs, whole) < 1e-6


@pytest.mark.parametrize("keep", ["add_k_proj|linear_out", r"to_qkv_mlp_proj\.weight$", r"attn\.to_(v|out)"])
def test_runs_beside_kept_layers(copy, monkeypatch, keep):
    """What is kept has its columns side by side, and may be put together with, or read, what has not."""
    monkeypatch.setattr(precision, "RUNS", 2)
    found = []
    for widths in ((), (48, 32, 16)):
        monkeypatch.setattr(int8, "RUN_WIDTHS", widths)
        export(copy, precision="int8", components=["transformer"], keep=keep, force=True)
        found.append(run(copy, "transformer", "int8"))
    assert distance(*found) < 1e-6
    (file,) = read_manifest(copy).builds["int8"].components["transformer"].weights
    stored = read_header(copy / file)
    kept = {name for name in stored if re.search(keep, re.sub(r"(\.\d+)+$", "", name)) and "scale" not in name}
    assert kept
    assert all(stored[name].dtype != "I8" for name in kept)


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_convolutions_of_integers(copy, monkeypatch, flavour):
    """Those of the decoder that follow a norm, and have channels enough; in bands, of a picture that is not square."""
    monkeypatch.setattr(precision, "adds_int8_products_exactly", lambda: True)
    export(copy, precision="int8", flavour=flavour)
    convolutions = operators(copy, "vae_decoder", "int8", flavour)["Conv"]
    monkeypatch.setattr(precision, "CONV_CHANNELS", 1)
    export(copy, precision="int8", flavour=flavour, force=True)
    (file,) = read_manifest(copy).builds[build_name("int8", flavour)].components["vae_decoder"].weights
    rounded = [name for name, tensor in read_header(copy / file).items() if tensor.dtype == "I8"]
    assert rounded
    assert all(".resnets." in name and "shortcut" not in name for name in rounded)
    if flavour == "ort":
        assert operators(copy, "vae_decoder", "int8", flavour)["Conv"] == convolutions - len(rounded)
    export(copy)
    shape = (2, inputs_of("vae_decoder")["latents"].shape[1], 3, 5)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    floats = run(copy, "vae_decoder", "bf16", latents=latents)
    found = run(copy, "vae_decoder", "int8", flavour, latents=latents)
    assert 0 < distance(found, floats) < 0.03
    # taken to a processor that has to make the weights unsigned
    monkeypatch.setattr(session, "adds_int8_products_exactly", lambda: False)
    assert distance(run(copy, "vae_decoder", "int8", flavour, latents=latents), found) < 1e-6


def test_convolutions_stay_floats_where_integers_overflow(copy, monkeypatch):
    monkeypatch.setattr(precision, "adds_int8_products_exactly", lambda: False)
    monkeypatch.setattr(precision, "CONV_CHANNELS", 1)
    export(copy, precision="int8")
    assert "MatMulIntegerToFloat" not in operators(copy, "vae_decoder", "int8")


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
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(
        built / graph_file(component, name, "portable"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = model(inputs_of(component))[model.outputs[0]]
    # it may round activations otherwise, but the weights are the same
    assert distance(found, run(built, component, name, "portable")) < 0.02


def test_kept_layers(copy, built):
    with_all = distance(run(built, "transformer", "int8"), run(built, "transformer", "bf16"))
    export(copy, precision="int8", keep=r"single_.*to_out|ff\.", components=["transformer"])
    assert operators(copy, "transformer", "int8")["MatMulIntegerToFloat"] == 40 - 2 - 6
    assert distance(run(copy, "transformer", "int8"), run(built, "transformer", "bf16")) < with_all
    export(copy, precision="int8", keep=".", components=["transformer"], force=True)
    np.testing.assert_array_equal(run(copy, "transformer", "int8"), run(built, "transformer", "bf16"))


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_rotation_takes_outliers_out(monkeypatch, checkpoints, tmp_path, flavour):
    """A few channels of the text encoder's embeddings that are fifty times as large as the rest, as Qwen3 has them."""
    monkeypatch.setattr(precision, "ROTATION", 16)  # rows of 48 are no multiple of 256
    monkeypatch.setattr(precision, "NARROWING_ROTATION", 1 << 20)  # none without `rotate`
    monkeypatch.setattr(precision, "adds_int8_products_exactly", lambda: True)  # the limit on pairs is another matter
    root = Path(shutil.copytree(checkpoints.get(Case("odd-heads", "fp32")), tmp_path / "model"))
    path = root / "text_encoder/model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "layernorm" in name:
            tensors[name][[3, 17]] *= 50
    save_file(tensors, path)
    export(root, precision="fp32", components=["text_encoder"])
    found = []
    for rotate in (False, True):
        export(root, precision="int8", flavour=flavour, rotate=rotate, components=["text_encoder"], force=True)
        found.append(distance(run(root, "text_encoder", "int8", flavour), run(root, "text_encoder", "fp32")))
    assert found[1] < 0.6 * found[0]


def test_what_narrows_is_rotated(monkeypatch, checkpoints, tmp_path):
    """Products of activations have outliers; without any in the weights, most of the error comes from there."""
    root = Path(shutil.copytree(checkpoints.get(Case("one-double-three-single")), tmp_path / "model"))
    export(root, components=["transformer"])
    found = []
    for group in (64, 1 << 20):
        monkeypatch.setattr(precision, "NARROWING_ROTATION", group)
        (root / "transformer/int8.safetensors").unlink(missing_ok=True)
        export(root, precision="int8", components=["transformer"], force=True)
        found.append(distance(run(root, "transformer", "int8"), run(root, "transformer", "bf16")))
    assert found[0] < 0.85 * found[1]


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


def test_loading_a_stale_build_keeps_its_settings(copy, monkeypatch):
    export(copy, precision="int4", block=32, keep="ff")
    monkeypatch.setattr("fluxonnx.api.__version__", "99")
    monkeypatch.setattr(exporter, "__version__", "99")
    fluxonnx.load(copy, precision="int4").close()
    settings = read_manifest(copy).builds["int4"].settings
    assert (settings["block"], settings["keep"]) == ("32", "ff")


def test_loading_adds_only_what_is_missing(copy, monkeypatch):
    """What an interrupted export finished is kept; a build for another processor is made anew, whole."""
    export(copy, precision="int8", components=["text_encoder", "transformer"])
    before = {
        name: content for name, content in files(copy).items() if name.endswith((".int8.onnx", "int8.safetensors"))
    }
    stamps = {name: (copy / name).stat().st_mtime_ns for name in before}
    fluxonnx.load(copy, precision="int8").close()
    assert stamps == {name: (copy / name).stat().st_mtime_ns for name in before}
    (copy / "vae_decoder.int8.onnx").unlink()
    products = read_manifest(copy).builds["int8"].settings["products"]
    monkeypatch.setattr(precision, "adds_int8_products_exactly", lambda: products == "pairs")
    fluxonnx.load(copy, precision="int8").close()
    build = read_manifest(copy).builds["int8"]
    assert build.settings["products"] != products
    assert set(build.components) == set(COMPONENTS)


class Stop(Exception):
    pass


def test_interrupted_export_goes_on(copy, built, monkeypatch):
    """What was written is not made again, and the file is the same as without the interruption."""
    made = []
    real = precision.quantise.int8_columns

    def stop_after(limit):
        def encode(tensor, *settings):
            if len(made) >= limit:
                raise Stop
            made.append(tensor.name)
            return real(tensor, *settings)

        return encode

    monkeypatch.setattr(weights, "WORKERS", 1)
    monkeypatch.setattr(precision.quantise, "int8_columns", stop_after(9))
    with pytest.raises(Stop):
        export(copy, precision="int8", components=["transformer"])
    assert not (copy / "transformer/int8.safetensors").exists()
    first, made[:] = list(made), []
    monkeypatch.setattr(precision.quantise, "int8_columns", stop_after(1000))
    export(copy, precision="int8", components=["transformer"])
    assert len(first) == 9
    assert 28 - 9 <= len(made) <= 28 - 9 + 3  # some were made ahead, but not written
    monkeypatch.undo()
    expected = files(built)
    for name, content in files(copy).items():
        assert ".partial" not in name
        if name.startswith("transformer"):
            assert content == expected[name], name


def test_partial_file_of_other_settings_is_not_used(copy, built, monkeypatch):
    monkeypatch.setattr(precision.quantise, "int8_columns", lambda *_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        export(copy, precision="int8", keep="ff", components=["transformer"])
    monkeypatch.undo()
    export(copy, precision="int8", components=["transformer"])
    assert (copy / "transformer/int8.safetensors").read_bytes() == files(built)["transformer/int8.safetensors"]


def test_two_exports_at_once(copy):
    fcntl = pytest.importorskip("fcntl")
    with (copy / "transformer/.int8.safetensors.partial").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ExportError, match="another process"):
            export(copy, precision="int8", components=["transformer"])


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
        ({"precision": "int3"}, "choose one of bf16, fp32, fp16, int8, int4"),
    ],
)
def test_impossible_options(copy, options, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        export(copy, **options)
