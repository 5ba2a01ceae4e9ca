"""fp16 builds: close to the checkpoint, half of float32's size, and finite whatever the activations are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.cli import main
from fluxonnx.contract import COMPONENTS
from fluxonnx.errors import CheckpointError
from fluxonnx.export import export
from fluxonnx.export.precisions import rounding
from tests.conformance import openvino
from tests.support import Case, golden_inputs, relative_error, run_graph

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
MODELS = ["text_encoder", "transformer", "vae_encoder", "vae_decoder"]

# Relative L2 against float32. A float16 is off by up to 2**-11, 0.0003 on average, each time that something is rounded
# to one; the autoencoder does so most often, once per convolution for what goes in and what comes out.
TOLERANCE = 2e-3

# Operators that may see a float16: the products, and what moves or scales their operands.
PRODUCTS = {"Gemm", "Conv", "MatMul", "MultiHeadAttention"}
AROUND_PRODUCTS = {"Cast", "Gather", "Reshape", "Slice", "Transpose", "Mul"}


@pytest.fixture(scope="module")
def built(checkpoints) -> Path:
    checkpoints.exported(CASE)
    checkpoints.exported(CASE, "fp16", "portable")
    return checkpoints.exported(CASE, "fp16")


def reference(root: Path, component: str, precision: str = "fp16", intermediate: bool = False):
    """Run a portable graph as ONNX defines it: onnxruntime's CPU provider takes most of float16's rounding out."""
    model = onnx.load(root / graph_file(component, precision, "portable"))
    found = ReferenceEvaluator(model).run(None, golden_inputs(component), intermediate=intermediate)
    return found if intermediate else found[0]


def change(path: Path, edit: Callable[[str, np.ndarray], np.ndarray]) -> None:
    save_file({name: edit(name, array) for name, array in load_file(path).items()}, path)


@pytest.mark.parametrize("component", MODELS)
def test_is_close_to_the_checkpoint(built, component):
    expected = run_graph(built, component, "bf16")
    assert 1e-5 < relative_error(reference(built, component), expected) < TOLERANCE
    for flavour in ("ort", "portable"):
        assert relative_error(run_graph(built, component, "fp16", flavour), expected) < TOLERANCE


@pytest.mark.parametrize("component", MODELS)
def test_openvino(built, component):
    pytest.importorskip("openvino")
    inputs = golden_inputs(component)
    found = openvino.load(built / graph_file(component, "fp16", "portable"), inputs)(inputs)[0]
    assert relative_error(found, run_graph(built, component, "bf16")) < TOLERANCE


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_only_products_are_float16(built, flavour):
    """Norms, softmax, residual streams and modulation see float32, and so does the outside."""
    for component in COMPONENTS:
        model = onnx.load(built / graph_file(component, "fp16", flavour), load_external_data=False)
        values = onnx.shape_inference.infer_shapes(model).graph.value_info if flavour == "portable" else []
        values = values or model.graph.value_info
        types = {info.name: info.type.tensor_type.elem_type for info in values}
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        assert TensorProto.BFLOAT16 not in types.values()
        half = [node for node in model.graph.node if any(types.get(x) == TensorProto.FLOAT16 for x in node.input)]
        kinds = {node.op_type for node in half}
        assert kinds <= PRODUCTS | AROUND_PRODUCTS
        assert bool(kinds & PRODUCTS) == (component != "conditioning")
        for info in (*model.graph.input, *model.graph.output):
            assert info.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.INT64)
        for node in model.graph.node:
            if component in ("text_encoder", "transformer") and node.op_type in ("Gemm", "MultiHeadAttention"):
                in_block = "/transformer_blocks.0" in node.name or "/layers.0" in node.name
                assert not in_block or node in half, node.name


def test_files_are_half_the_size(built, checkpoints):
    single = checkpoints.exported(CASE, "fp32")
    for folder, part in (("text_encoder", ""), ("transformer", ""), ("vae", "encoder."), ("vae", "decoder.")):
        half, whole = (read_header(single / folder / f"{part}{name}.safetensors") for name in ("fp16", "fp32"))
        assert {"F16"} == {half[name].dtype for name, tensor in whole.items() if len(tensor.shape) > 1}
        assert sum(t.nbytes for t in half.values()) < 0.51 * sum(t.nbytes for t in whole.values())


def test_weights_are_the_checkpoints(built):
    """As trained weights fit, they can be used by other programs."""
    source = read_header(built / "transformer/diffusion_pytorch_model.safetensors")
    found = read_header(built / "transformer/fp16.safetensors")
    for name, tensor in source.items():
        dtype = np.float16 if len(tensor.shape) > 1 else np.float32
        np.testing.assert_array_equal(found[name].array(), tensor.array().astype(dtype))


def overflowing(name: str, array: np.ndarray) -> np.ndarray:
    """Make the feed-forward of the text stream and of the text encoder reach far beyond 65504."""
    large = ("ff_context.linear_in.weight", "mlp.up_proj.weight", "mlp.gate_proj.weight", "attn.add_v_proj.weight")
    return array * 2000 if name.endswith(large) else array


@pytest.mark.filterwarnings("ignore::RuntimeWarning:onnx")  # its sigmoid computes both branches
@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_activations_beyond_float16(checkpoints, tmp_path, component):
    root = Path(shutil.copytree(checkpoints.get(Case("odd-heads", "fp32")), tmp_path / "model"))
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    change(root / component / f"{stem}.safetensors", overflowing)
    for precision in ("fp32", "fp16"):
        for flavour in ("ort", "portable"):
            export(root, precision=precision, flavour=flavour, components=[component])
    values = reference(root, component, "fp32", intermediate=True)
    floats = {name: x for name, x in values.items() if isinstance(x, np.ndarray) and x.dtype == np.float32}
    masked = 1e30  # what causal_padding_bias subtracts is larger
    beyond = [name for name, x in floats.items() if ((np.abs(x) > 65504) & (np.abs(x) < masked)).any()]
    assert any("MatMul" in name for name in beyond)
    assert any("Add" in name for name in beyond)

    expected = run_graph(root, component, "fp32")
    found = [
        reference(root, component),
        *(run_graph(root, component, "fp16", flavour) for flavour in ("ort", "portable")),
    ]
    for output in found:
        assert np.isfinite(output).all()
        assert relative_error(output, expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore::RuntimeWarning:onnx")
@pytest.mark.parametrize("factor", [1e7, 1e-7], ids=["large", "small"])
@pytest.mark.parametrize("component", MODELS)
def test_weights_beyond_float16(checkpoints, tmp_path, component, factor):
    """Weights of which a cast would make infinities, or zeros and single bits."""
    root = Path(shutil.copytree(checkpoints.get(Case("odd-heads", "fp32")), tmp_path / "model"))
    names = ("embed_tokens.weight", "v_proj.weight", "to_qkv_mlp_proj.weight", "conv1.weight", "to_q.weight")
    for path in root.glob("*/*.safetensors"):
        change(path, lambda name, array: array * np.float32(factor) if name.endswith(names) else array)
    export(root, precision="fp32", components=[component])
    export(root, precision="fp16", components=[component], flavour="portable")
    expected = run_graph(root, component, "fp32")
    found = reference(root, component)
    assert np.isfinite(found).all()
    assert relative_error(found, expected) < TOLERANCE


def stored(tmp_path: Path, array: np.ndarray):
    save_file({"w": array}, tmp_path / "w.safetensors")
    return read_header(tmp_path / "w.safetensors")["w"]


@pytest.mark.parametrize("shape", [(300, 48), (5, 7, 3, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_half(tmp_path, shape, dtype):
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    half, scale = rounding.half(stored(tmp_path, values))
    assert (half.dtype, scale.dtype, scale.shape, scale) == (np.float16, np.float32, (), 1)
    np.testing.assert_array_equal(half, values.astype(np.float32).astype(np.float16))


@pytest.mark.parametrize("factor", [2.0**100, 1e5, 1e-5, 1e-20, 1e-38])
def test_half_of_what_does_not_fit(tmp_path, factor):
    """The scale is a power of two, so only float16's own rounding is lost, and no output's weights exceed the limit."""
    values = (np.random.default_rng(0).standard_normal((300, 48)) * factor).astype(np.float32)
    half, scale = rounding.half(stored(tmp_path, values))
    assert np.frexp(scale)[0] == 0.5
    assert np.isfinite(half).all()
    assert np.abs(half.astype(np.float64)).sum(1).max() < 1.001 * rounding.HALF_SUM
    assert relative_error(half.astype(np.float64) * scale, values.astype(np.float64)) < 3e-4


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"w\.safetensors: w holds infinities or NaNs"):
        rounding.half(stored(tmp_path, np.full((2, 3), value, np.float32)))
    zeros, scale = rounding.half(stored(tmp_path, np.zeros((2, 3), np.float32)))
    assert not zeros.any()
    assert scale == 1


def test_commands(copy_of, tmp_path, capsys):
    root, output = copy_of(CASE), tmp_path / "x.png"
    assert main(["export", "-d", str(root), "--precision", "fp16"]) == 0
    assert "transformer.fp16.onnx" in capsys.readouterr().err
    size = ["-W", "64", "-H", "64", "-s", "1", "-S", "1"]
    assert main(["generate", "-d", str(root), "--precision", "fp16", "-p", "x", "-o", str(output), *size]) == 0
    assert main(["info", str(output)]) == 0
    assert '"precision": "fp16"' in capsys.readouterr().out
