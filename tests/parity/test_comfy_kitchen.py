"""ComfyUI's own quantiser (comfy-kitchen's reference in PyTorch) writes, fluxonnx reads: the weights are the same."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from fluxonnx.checkpoint.formats import resolve
from fluxonnx.checkpoint.safetensors import read_header, read_metadata
from fluxonnx.export import export, ops, weights
from fluxonnx.export.ops import ModelBuilder
from fluxonnx.export.precisions import Int8, Precision, make_precision
from fluxonnx.ports import Port
from tests import comfyui
from tests.comfyui import Form
from tests.support import GRAPH_TOLERANCE, Case, optional, relative_error, run_graph

pytestmark = [pytest.mark.parity, pytest.mark.slow, optional("torch", "comfy_kitchen")]

N_OUT, N_IN = 48, 512
# The layer's names in the file and in the model.
LAYER, MODULE = "single_blocks.0.linear2", "single_transformer_blocks.0.attn.to_out"

DIALECTS = [
    Form(group=0, per_row=False),
    Form(group=0, per_row=True),
    Form(group=0, per_row=True, marker="unnamed", flat=True),
    Form(group=0, per_row=False, marker="metadata", scale="scale_weight"),
    Form(group=4, per_row=True, marker="nested"),
    Form(group=16, per_row=True, marker="unnamed"),
    Form(group=64, per_row=True, marker="metadata", names="prefixed"),
    Form(group=256, per_row=True, extras=True),
    Form(group=256, per_row=True, marker="twice", scale="scale_weight", flat=True, names="short prefix"),
]


def kitchen(weight: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Integers [out, in] and float32 scales [out, 1] or [], as ComfyUI makes them."""
    return _quantised(weight, form)[:2]


def _quantised(weight: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, scales, and the weights that ComfyUI makes of them again: float32 [out, in]."""
    import comfy_kitchen
    import torch
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    with comfy_kitchen.registry.use_backend("eager"):
        integers, params = TensorWiseINT8Layout.quantize(
            torch.from_numpy(weight.astype(np.float32)),
            per_channel=form.per_row,
            convrot=form.group > 0,
            **({"convrot_groupsize": form.group} if form.group else {}),
        )
        restored = TensorWiseINT8Layout.dequantize(integers, params)
    return integers.numpy(), params.scale.numpy(), restored.numpy()


def comfyuis_product(x: np.ndarray, integers: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
    """The linear layer as ComfyUI computes it: rows of `x` rotated and rounded to 8 bits, products of integers."""
    import comfy_kitchen
    import torch

    with comfy_kitchen.registry.use_backend("eager"):
        arrays = [torch.from_numpy(array) for array in (x, integers, scale)]
        rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
        return comfy_kitchen.int8_linear(*arrays, None, torch.float32, **rotation).numpy()


def write(path: Path, form: Form, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    integers, scale, restored = _quantised(weight, form)
    save_file(form.stored(form.prefix + LAYER, integers, scale), path, form.metadata([LAYER]))
    return integers, scale, restored


def product(file: Path, precision: Precision, flavour: str, x: np.ndarray) -> np.ndarray:
    """Export the layer alone, and multiply `x` [rows, in] by it."""
    import onnxruntime

    tensors = resolve(read_header(file), [read_metadata(file)])
    opset = max(17, precision.lowest_opset(flavour))
    g = ModelBuilder("layer", precision, flavour, opset, tensors)
    rows = g.input(Port("x", "F32", ("batch", "seq", N_IN), ""))
    y = ops.linear(g, rows, MODULE, N_IN, N_OUT)
    g.output(Port("y", "F32", ("batch", "seq", N_OUT), ""), y)
    graph = g.finish("", {})
    weights.place(graph, file.parent, "stored.safetensors", {}, lambda done, total: None)
    onnx.save(graph.model, file.parent / "layer.onnx")
    session = onnxruntime.InferenceSession(file.parent / "layer.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x[None]})[0][0]


@pytest.fixture
def layer_weight() -> np.ndarray:
    """With an outlier, a row of zeros and a row of one value."""
    weight = np.random.default_rng(0).standard_normal((N_OUT, N_IN)).astype(np.float32)
    weight[3, 7] = 40
    weight[5] = 0
    weight[6] = 0.25
    return weight


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((37, N_IN)).astype(np.float32)


@pytest.mark.parametrize("form", DIALECTS, ids=lambda form: f"{form.id}-{form.group}")
def test_int8_is_comfyuis_product(tmp_path, form, layer_weight, x):
    """The integers themselves, for both kinds of processors, and ComfyUI's result with its own rounding of `x`."""
    integers, scale, restored = write(tmp_path / "layer.safetensors", form, layer_weight)
    expected = comfyuis_product(x, integers, scale, form.group)
    for flavour in ("ort", "portable"):
        found = product(tmp_path / "layer.safetensors", Int8(), flavour, x)
        # where a rotated activation lies between two steps, the order of its sum decides
        assert relative_error(found, expected) < (1e-3 if form.group else GRAPH_TOLERANCE)
        assert relative_error(found, x @ restored.T) < 0.01
    for saturating in (False, True):
        product(tmp_path / "layer.safetensors", Int8(saturating=saturating), "ort", x)
        stored = load_file(tmp_path / "stored.safetensors")
        values = stored[f"{MODULE}.weight"].astype(int) - (128 if saturating else 0)
        np.testing.assert_array_equal(values, integers.T)
        np.testing.assert_array_equal(
            stored[f"{MODULE}.weight.scale"], np.broadcast_to(scale.reshape(-1), integers.shape[:1])
        )


@pytest.mark.parametrize("form", DIALECTS, ids=lambda form: f"{form.id}-{form.group}")
def test_other_precisions_compute_with_the_weights_that_comfyui_restores(tmp_path, form, layer_weight, x):
    restored = write(tmp_path / "layer.safetensors", form, layer_weight)[2]
    rounded = restored.astype(ml_dtypes.bfloat16).astype(np.float32)
    # a restored weight may lie between two bfloat16 values, and so fall on the other side
    limits = {"fp32": (restored, GRAPH_TOLERANCE), "bf16": (rounded, 3e-4), "fp16": (restored, 1e-3)}
    for name, (weight, limit) in limits.items():
        for flavour in ("ort", "portable"):
            found = product(tmp_path / "layer.safetensors", make_precision(name), flavour, x)
            assert relative_error(found, x @ weight.T) < limit, (name, flavour)
    for flavour in ("ort", "portable"):
        found = product(tmp_path / "layer.safetensors", make_precision("int4"), flavour, x)
        assert relative_error(found, x @ restored.T) < 0.12, flavour


@pytest.mark.parametrize("form", [Form(per_row=False), Form("diffusers", 16, extras=True)], ids=lambda form: form.id)
def test_whole_transformer(copy_of, tmp_path, form):
    """Quantised by ComfyUI: fp32 has the restored weights, int8 is as close as its rounding of activations allows."""
    copy = copy_of(Case("odd-heads"))
    original = copy / "transformer/diffusion_pytorch_model.safetensors"
    file = tmp_path / "comfyui.safetensors"
    comfyui.write(original, file, form, kitchen)
    for precision in ("fp32", "int8"):
        export(copy, transformer=file, precision=precision, components=["transformer"])
    read = run_graph(copy, "transformer", "fp32")

    # A restored file with diffusers' names; a scale for the fused q, k and v is that of all three.
    tensors = load_file(original)
    source = tensors if form.names == "diffusers" else comfyui.original_names(tensors)
    restored = {
        name: _quantised(array, form)[2] if "blocks." in name and array.ndim == 2 else array
        for name, array in source.items()
    }
    save_file(restored, file)
    export(copy, transformer=file, precision="fp32", components=["transformer"], force=True)
    assert relative_error(read, run_graph(copy, "transformer", "fp32")) < GRAPH_TOLERANCE
    assert relative_error(run_graph(copy, "transformer", "int8"), read) < 0.02
