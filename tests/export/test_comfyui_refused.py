"""ComfyUI's transformers that can't be read as they are meant: one line says why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import comfyui
from tests.comfyui import Form
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
GROUP = 16  # rows of 96 are no multiple of 256
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(copy_of) -> Path:
    return copy_of(CASE)


def marked(**config) -> np.ndarray:
    return np.frombuffer(json.dumps(config).encode(), np.uint8)


LAYER = "double_blocks.0.img_attn.proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"comfy_quant": marked(format="float8_e4m3fn")},
            "is I8, but is said to be float8_e4m3fn",
        ),
        ({"comfy_quant": marked(format="nvfp4")}, "but nvfp4 is U8"),
        ({"comfy_quant": marked(format=[5])}, r"quantised as \[5\]"),
        ({"comfy_quant": np.zeros(3, np.uint8)}, "proj.comfy_quant is not JSON"),
        ({"comfy_quant": np.frombuffer(b"[1]", np.uint8)}, "proj.comfy_quant is no JSON object"),
        ({"comfy_quant": marked(format="asym_w4a8_int8")}, "quantised as asym_w4a8_int8"),
        ({"comfy_quant": marked(format="int8_tensorwise", symmetric=False)}, "around another number than 0"),
        ({"weight_scale": None}, "is I8, but has no scale"),
        ({"weight_scale": np.ones(5, np.float32)}, r"weight_scale is F32 \[5\], expected F32 \[\] or \[96, 1\]"),
        ({"weight_scale": np.ones((1, 96), np.float32)}, r"weight_scale is F32 \[1, 96\], expected"),
        ({"weight_scale": np.ones((96, 1), np.float64)}, r"weight_scale is F64 \[96, 1\], expected F32"),
        ({"weight_scale": np.ones((96, 1), np.int8)}, r"weight_scale is I8 \[96, 1\], expected F32"),
        ({"weight_scale": np.full((96, 1), np.nan, np.float32)}, "weight_scale holds infinities or NaNs"),
        ({"weight_scale": np.full((), 3e38, np.float32)}, "weight_scale holds infinities or NaNs"),
        ({"+scale_weight": np.ones((), np.float32)}, "weight has two scales, .*weight_scale and .*scale_weight"),
        ({"+pre_quant_scale": np.ones(96, np.float32)}, r"in a ComfyUI format \(.*pre_quant_scale\)"),
        (
            {"weight": np.zeros((96, 96), np.float32), "comfy_quant": None},
            r"proj.weight is F32, but has a scale \(.*proj.weight_scale\)",
        ),
        ({"weight": np.zeros((96, 96), np.float32)}, r"is F32 \[96, 96\], but int8_tensorwise is I8"),
        ({"weight": np.zeros((96, 48), np.int8)}, "has shape"),
        (
            {"comfy_quant": marked(format="int8_tensorwise", convrot=True, convrot_groupsize=256)},
            "in groups of 256, which is no power of four that divides 96",
        ),
        (
            {"comfy_quant": marked(format="int8_tensorwise", convrot=True, convrot_groupsize=32)},
            "in groups of 32",
        ),
    ],
)
def test_unreadable_files(copy, tmp_path, fails, changes, message):
    file = tmp_path / "comfyui.safetensors"
    comfyui.write(copy / WEIGHTS, file, Form())
    tensors = load_file(file)
    for parameter, array in changes.items():
        if not parameter.startswith("+"):
            tensors.pop(f"{LAYER}.{parameter}")
        parameter = parameter.removeprefix("+")
        tensors |= {f"{LAYER}.{parameter}": array} if array is not None else {}
    save_file(tensors, file)
    fails(1, message, "export", "-d", copy, "--transformer", file, "--component", "transformer", "-q")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "_quantization_metadata are malformed"),
        ("[]", "_quantization_metadata are malformed"),
        (json.dumps({"layers": {LAYER: 5}}), "_quantization_metadata are malformed"),
        (json.dumps({"layers": {LAYER: "int8_tensorwise"}}), "is I8, but the header's .* do not list it"),
        (json.dumps({"layers": {LAYER: "int8_blockwise"}}), "(do not list it|quantised as int8_blockwise)"),
    ],
)
def test_unreadable_metadata(copy, tmp_path, fails, metadata, message):
    """What they say of the rotation must not be lost."""
    file = tmp_path / "comfyui.safetensors"
    comfyui.write(copy / WEIGHTS, file, Form(marker="none"))
    save_file(load_file(file), file, {"_quantization_metadata": metadata})
    fails(1, message, "export", "-d", copy, "--transformer", file, "--component", "transformer", "-q")


def test_contradictory_rotation(copy, tmp_path, fails):
    file, form = tmp_path / "comfyui.safetensors", Form(group=GROUP)
    integers = comfyui.write(copy / WEIGHTS, file, form)
    save_file(load_file(file), file, Form(marker="metadata").metadata(integers))
    fails(1, "contradict each other", "export", "-d", copy, "--transformer", file, "--component", "transformer", "-q")


def test_integers_without_scales_are_refused(copy, fails):
    """They would be taken for weights."""
    path = copy / "text_encoder/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].astype(np.int8)
    save_file(tensors, path)
    fails(
        1,
        r"model.layers.0.mlp.up_proj.weight is I8, but has no scale",
        "export",
        "-d",
        copy,
        "--component",
        "text_encoder",
        "-q",
    )
