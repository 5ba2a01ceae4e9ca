"""8-bit floats: every weight is what its bytes and scales say, bit for bit, and builds compute with these weights."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from safetensors.numpy import load_file, save_file

from fluxonnx.checkpoint.formats import resolve
from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.contract import open_checkpoint
from fluxonnx.errors import CheckpointError
from fluxonnx.export import export
from tests import comfyui, formats
from tests.support import Case, relative_error, run_graph

CASE = Case("odd-heads", "fp32")
FILES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def both(root: Path, component: str, form: str, folder: Path) -> tuple[Path, Path]:
    """A file in a form and by the original's names, and one of the float32 weights that it holds."""
    tensors = load_file(root / FILES[component])
    if component == "transformer":
        tensors = comfyui.original_names(tensors)
    stored, values = formats.in_form(tensors, formats.FORMS[form], markers=True)
    return (
        formats.write(folder / f"{form}.safetensors", stored),
        formats.write(folder / "values.safetensors", values),
    )


@pytest.mark.parametrize("component", FILES)
@pytest.mark.parametrize("form", formats.FORMS)
def test_values(checkpoints, tmp_path, form, component):
    root = checkpoints.get(CASE)
    file, values = both(root, component, form, tmp_path)
    found, expected = (open_checkpoint(root, **{component: path}).tensors(component) for path in (file, values))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.array().dtype == expected[name].array().dtype
        np.testing.assert_array_equal(tensor.array(), expected[name].array(), err_msg=name)
        for count in (100, 1 << 22):
            pieces = [piece.reshape(-1) for piece in tensor.pieces(count)]
            np.testing.assert_array_equal(np.concatenate(pieces), tensor.array().reshape(-1), err_msg=name)
        if len(tensor.shape) == 2:
            # any rows of any part, also where halves have changed places
            for start, end in ((0, 5), (5, 50), (40, None), (7, 7)):
                np.testing.assert_array_equal(tensor.rows(start, end), expected[name].rows(start, end), err_msg=name)
            half = tensor.shape[0] // 2
            for one, other in zip(tensor.split([half] * 2), expected[name].split([half] * 2), strict=True):
                np.testing.assert_array_equal(one.array(), other.array(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("component", FILES)
@pytest.mark.parametrize("form", formats.FORMS)
def test_graphs_of_bfloat16_take_them(copy_of, tmp_path, form, component):
    """Each is cast to the type that the graph computes in."""
    root = copy_of(CASE)
    file, _ = both(root, component, form, tmp_path)
    export(root, **{component: file}, precision="bf16-native", components=[component])
    model = onnx.load(root / graph_file(component, "bf16-native", "ort"), load_external_data=False)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    products = [node.output[0] for node in model.graph.node if node.op_type == "Gemm"]
    assert products
    assert {types[name] for name in products} == {TensorProto.BFLOAT16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "component"),
    [
        ("fp8", "transformer"),
        ("fp8-rows", "transformer"),
        ("fp8-scaled", "transformer"),
        ("fp8-e5m2", "text_encoder"),
        ("fp8-rows", "text_encoder"),
    ],
)
def test_bytes_stay_in_place(copy_of, tmp_path, component, form):
    """The graph casts them, and gives what the float32 graph of their values gives."""
    root = copy_of(CASE)
    file, values = both(root, component, form, root)
    export(root, components=[component], precision="fp32", **{component: values})
    expected = run_graph(root, component, "fp32")
    export(root, components=[component], precision="fp32", force=True, **{component: file})
    np.testing.assert_array_equal(run_graph(root, component, "fp32"), expected)
    export(root, components=[component], **{component: file})
    assert relative_error(run_graph(root, component, "bf16"), expected) < 1e-6
    model = onnx.load(root / graph_file(component, "bf16", "ort"), load_external_data=False)
    dtypes = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)
    eight = [tensor for tensor in model.graph.initializer if tensor.data_type in dtypes]
    assert len(eight) > 20
    places = [entry.value for tensor in eight for entry in tensor.external_data if entry.key == "location"]
    # all but the one whose halves change places
    assert len([place for place in places if place != file.name]) == (component == "transformer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "precision", "flavour"),
    [
        ("fp8-scaled", "bf16", "portable"),
        ("fp8-blocks", "bf16", "ort"),
        ("fp8-scaled", "int8", "ort"),
        ("fp8-blocks", "int8", "portable"),
        ("fp8-scaled", "int4", "ort"),
    ],
)
def test_other_builds(copy_of, tmp_path, form, precision, flavour):
    """They are made from the values: as near to these as a build of a file of floats is."""
    root = copy_of(CASE)
    file, values = both(root, "transformer", form, tmp_path)
    export(root, components=["transformer"], precision="fp32", transformer=values)
    exact = run_graph(root, "transformer", "fp32")
    errors = []
    for path in (file, values):
        export(root, components=["transformer"], precision=precision, flavour=flavour, transformer=path, force=True)
        errors.append(relative_error(run_graph(root, "transformer", precision, flavour), exact))
    # what is not quantised is rounded to bf16 only if it has to be computed
    assert errors[0] < 1.1 * errors[1] + 4e-3, errors


LAYER = "single_blocks.0.linear1"


def marker(form: str) -> np.ndarray:
    return np.frombuffer(f'{{"format": "{form}"}}'.encode(), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": np.ones(5, np.float32)}, r"weight_scale is \[5\], expected \[\], \[.*, 1\] or \[.*\] for"),
        ({"weight_scale": np.ones((), np.int8)}, "weight_scale is I8, expected F32, F16 or BF16"),
        ({"weight_scale": np.full((), np.nan, np.float32)}, "weight_scale holds infinities or NaNs"),
        ({"scale_weight": np.ones((), np.float32)}, "has two scales"),
        ({"comfy_quant": marker("int8_tensorwise")}, "is quantised as int8_tensorwise"),
        ({"comfy_quant": marker("nvfp4")}, "but nvfp4 is U8"),
        ({"comfy_quant": marker("mxfp8")}, "has 4 scales, expected"),
        ({"comfy_quant": marker("mxfp8"), "weight_scale": None}, "mxfp8, but has no scales"),
        ({"pre_quant_scale": np.ones(96, np.float32)}, "in a ComfyUI format"),
        (
            {"weight": np.zeros((480, 48), np.uint8), "weight_scale_2": np.ones((), np.float32)},
            "weight_scale has 4 scales",
        ),
        ({"weight": None}, "in an unknown format"),
    ],
)
def test_damaged_layers(copy_of, tmp_path, changes, message):
    root = copy_of(CASE)
    file, _ = both(root, "transformer", "fp8-scaled", tmp_path)
    tensors = formats.load(file)
    for parameter, array in changes.items():
        tensors.pop(f"{LAYER}.{parameter}", None)
        tensors |= {} if array is None else {f"{LAYER}.{parameter}": array}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message) as error:
        export(root, components=["transformer"], transformer=file)
    assert "\n" not in str(error.value)


def test_every_byte(tmp_path):
    """Of both types, as ml_dtypes reads them."""
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        values = np.arange(256, dtype=np.uint8).reshape(4, 64).view(dtype)
        save_file({"double_blocks.0.img_mlp.0.weight": values}, tmp_path / "w.safetensors")
        (tensor,) = resolve(read_header(tmp_path / "w.safetensors")).values()
        np.testing.assert_array_equal(tensor.array(), values.astype(np.float32))
