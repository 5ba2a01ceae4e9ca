"""int8: integers that suit the processor, panels, integer convolutions, rotation."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from fluxonnx.checkpoint.manifest import build_name, graph_file, read_manifest
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.export import export
from fluxonnx.export.precisions.int8 import SATURATING_LEVELS, Int8, Tuning
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.session import Session, settings
from tests.support import Case, golden_inputs, int8_matrix, operators, relative_error, run_graph

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
# See `tests/export/test_quantised.py`.
TOLERANCE = 0.02


@pytest.fixture
def copy(copy_of) -> Path:
    return copy_of(CASE)


@pytest.fixture(scope="module")
def built(checkpoints) -> Path:
    checkpoints.exported(CASE, "int8")
    return checkpoints.exported(CASE)


@pytest.mark.parametrize("exact", [True, False], ids=["VNNI", "no VNNI"])
def test_integers_suit_the_processor(copy, built, exact):
    """Without VNNI, pairs of products must fit into 16 bits whatever the activations are."""
    export(copy, precision=Int8(saturating=not exact), components=["transformer"], force=True)
    weights = [
        t.array().astype(int) for t in read_header(copy / "transformer/int8.safetensors").values() if t.dtype == "I8"
    ]
    worst = max(np.abs(w[0::2] + w[1::2]).max() for w in weights)
    levels = 127 if exact else SATURATING_LEVELS
    fits_16_bits = bool(2 * levels * worst < 2**15)
    assert fits_16_bits == (not exact)
    assert relative_error(run_graph(copy, "transformer", "int8"), run_graph(built, "transformer", "bf16")) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("packed", [True, False])
def test_paired_products_are_exact(tmp_path, rows, packed):
    """The worst activations there can be, in onnxruntime's own kernels, against integers in numpy."""
    rng = np.random.default_rng(0)
    save_file({"w": rng.standard_normal((96, 256)).astype(np.float32)}, tmp_path / "w.safetensors")
    source = read_header(tmp_path / "w.safetensors")["w"]
    levels = SATURATING_LEVELS
    weights, _ = int8_matrix(source, (2**15 - 1) // (2 * levels))
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
    block computes k and v of all rows, and everything else of the picture's rows, which it rounds again.
    """
    counts = operators(built, "transformer", "int8")
    double, single = 2, 2
    assert counts["MatMulIntegerToFloat"] == 14 * double + 6 * single
    assert counts["QuantizeLinear"] == 8 * double + 2 * single + 1


@pytest.mark.parametrize("name", ["odd-heads", "one-double-three-single"])
@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_panels_are_the_whole(checkpoints, tmp_path, name, component):
    """Wide products are computed in panels; neither integers nor scales depend on where they are cut."""
    root = Path(shutil.copytree(checkpoints.get(Case(name)), tmp_path / "model"))
    found = []
    for widths in ((), (48, 32, 16)):
        precision = Int8(tuning=Tuning(panel_widths=widths, panels_at_once=2))
        export(root, precision=precision, components=[component], force=True)
        found.append((run_graph(root, component, "int8"), operators(root, component, "int8")))
    (whole, few), (panels, many) = found
    assert many["MatMulIntegerToFloat"] > few["MatMulIntegerToFloat"]
    assert many["Transpose"] > few["Transpose"]
    assert relative_error(panels, whole) < 1e-6


@pytest.mark.parametrize("keep", ["add_k_proj|linear_out", r"to_qkv_mlp_proj\.weight$", r"attn\.to_(v|out)"])
def test_panels_beside_kept_layers(copy, keep):
    """A kept layer has no panels; its columns are joined with, or read, those of layers that have."""
    found = []
    for widths in ((), (48, 32, 16)):
        precision = Int8(keep, tuning=Tuning(panel_widths=widths, panels_at_once=2))
        export(copy, precision=precision, components=["transformer"], force=True)
        found.append(run_graph(copy, "transformer", "int8"))
    assert relative_error(*found) < 1e-6
    (file,) = read_manifest(copy).builds["int8"].components["transformer"].weights
    stored = read_header(copy / file)
    kept = {name for name in stored if re.search(keep, re.sub(r"(\.\d+)+$", "", name)) and "scale" not in name}
    assert kept
    assert all(stored[name].dtype != "I8" for name in kept)


@pytest.mark.parametrize(("case", "flavour"), [(CASE, "ort"), (CASE, "portable"), (Case("wide-vae"), "ort")])
def test_convolutions_of_integers(copy_of, case, flavour):
    """In the decoder, behind a norm, with enough channels; in bands of rows, of a picture that is not square."""
    copy = copy_of(case)
    export(copy, precision=Int8(saturating=False), flavour=flavour)
    export(copy, precision=Int8(saturating=False, tuning=Tuning(conv_channels=1)), flavour=flavour, force=True)
    build = read_manifest(copy).builds[build_name("int8", flavour)]
    (file,) = build.components["vae_decoder"].weights
    rounded = [name for name, tensor in read_header(copy / file).items() if tensor.dtype == "I8"]
    assert rounded
    assert all(".resnets." in name and "shortcut" not in name for name in rounded)
    if flavour == "ort":
        graph = onnx.load(copy / graph_file("vae_decoder", "int8", flavour), load_external_data=False).graph
        read = {node.op_type: set[str]() for node in graph.node}
        for node in graph.node:
            read[node.op_type].update(re.sub(r"\.alias\d+$", "", name) for name in node.input)
        assert set(rounded) <= read["MatMulIntegerToFloat"]
        assert not set(rounded) & read["Conv"]
    export(copy)
    shape = (2, golden_inputs("vae_decoder")["latents"].shape[1], 3, 5)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    floats = run_graph(copy, "vae_decoder", "bf16", latents=latents)
    found = run_graph(copy, "vae_decoder", "int8", flavour, latents=latents)
    assert 0 < relative_error(found, floats) < 0.03
    # on a processor that has to make the weights unsigned
    options = SessionOptions()
    unsigned = settings("vae_decoder", build, options, exact_int8_dot=False)
    file = copy / graph_file("vae_decoder", "int8", flavour)
    with Session(file, "vae_decoder", options, build, override=unsigned) as session:
        assert relative_error(session.run(latents=latents)[0], found) < 1e-6


def test_convolutions_stay_floats_where_integers_overflow(copy):
    export(copy, precision=Int8(saturating=True, tuning=Tuning(conv_channels=1)))
    assert "MatMulIntegerToFloat" not in operators(copy, "vae_decoder", "int8")


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_rotation_takes_outliers_out(checkpoints, tmp_path, flavour):
    """A few channels of the residual stream that are fifty times as large as the rest, which no weight shows."""
    root = Path(shutil.copytree(checkpoints.get(Case("odd-heads", "fp32")), tmp_path / "model"))
    path = root / "text_encoder/model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "embed_tokens" in name:
            tensors[name][:, [3, 17]] *= 50
    save_file(tensors, path)
    export(root, precision="fp32", components=["text_encoder"])
    # rows of 48 are no multiple of 256; nothing is rotated without `rotate`; the limit on pairs is another matter
    tuning = Tuning(rotation=16, narrowing_rotation=1 << 20)
    found = []
    for rotate in (False, True):
        precision = Int8(rotate=rotate, saturating=False, tuning=tuning)
        export(root, precision=precision, flavour=flavour, components=["text_encoder"], force=True)
        expected = run_graph(root, "text_encoder", "fp32")
        found.append(relative_error(run_graph(root, "text_encoder", "int8", flavour), expected))
    assert found[1] < 0.7 * found[0]


def test_linears_that_narrow_are_rotated(checkpoints, tmp_path):
    """Products of activations have outliers; without outliers in the weights, most of the error comes from them."""
    root = Path(shutil.copytree(checkpoints.get(Case("one-double-three-single")), tmp_path / "model"))
    export(root, components=["transformer"])
    found = []
    for group in (64, 1 << 20):
        (root / "transformer/int8.safetensors").unlink(missing_ok=True)
        precision = Int8(tuning=Tuning(narrowing_rotation=group))
        export(root, precision=precision, components=["transformer"], force=True)
        expected = run_graph(root, "transformer", "bf16")
        found.append(relative_error(run_graph(root, "transformer", "int8"), expected))
    assert found[0] < 0.85 * found[1]
