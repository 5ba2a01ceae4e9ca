"""Text encoders and autoencoders as ComfyUI's tools quantise them: graphs of the same weights as their floats make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxonnx.cli import main
from fluxonnx.export import export
from tests import formats
from tests.support import GRAPH_TOLERANCE, Case, relative_error, run_graph

pytestmark = pytest.mark.slow

CASE = Case("odd-heads", "fp32")
FILES = {"text_encoder": "text_encoder/model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors"}
GRAPHS = {"text_encoder": ["text_encoder"], "vae": ["vae_encoder", "vae_decoder"]}
TOKENS = {"input_ids": np.arange(12)[None], "attention_mask": np.ones((1, 12), np.int64)}
# What rounding activations to 8 bits costs.
ROUNDED = 0.1


def quantised(tensors: dict[str, np.ndarray], marker: str) -> tuple[dict, dict, dict[str, str]]:
    """The tensors of a file, the floats that they mean, and the header's metadata; whatever has rows is quantised."""
    stored, meant, layers = {}, dict(tensors), {}
    for name, array in tensors.items():
        if array.ndim < 2:
            stored[name] = array
            continue
        layer, flat = name.removesuffix(".weight"), array.reshape(len(array), -1).astype(np.float32)
        scale = np.maximum(np.abs(flat).max(1), 1e-9) / np.float32(127)
        integers = np.rint(flat / scale[:, None]).astype(np.int8)
        meant[name] = (integers.astype(np.float32) * scale[:, None]).reshape(array.shape)
        shape = (-1, *(1 for _ in array.shape[1:]))
        stored |= {name: integers.reshape(array.shape), f"{layer}.weight_scale": scale.reshape(shape)}
        layers[layer] = {"format": "int8_tensorwise"}
        if marker == "tensor":
            stored[f"{layer}.comfy_quant"] = np.frombuffer(json.dumps(layers[layer]).encode(), np.uint8)
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if marker == "metadata" else {}
    return stored, meant, metadata


def inputs(graph: str) -> dict[str, np.ndarray]:
    if graph == "text_encoder":
        return TOKENS
    random, channels = np.random.default_rng(0), {"vae_encoder": 3, "vae_decoder": 32}[graph]
    side, name = (64, "sample") if graph == "vae_encoder" else (4, "latents")
    return {name: random.standard_normal((1, channels, side, side)).astype(np.float32)}


@pytest.mark.parametrize("marker", ["tensor", "metadata"])
@pytest.mark.parametrize("part", FILES)
def test_parts(checkpoints, tmp_path, part, marker):
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))
    floats = Path(shutil.copytree(root, tmp_path / "floats"))
    stored, meant, metadata = quantised(load_file(root / FILES[part]), marker)
    file = tmp_path / "int8.safetensors"
    save_file(stored, file, metadata)
    save_file(meant, floats / FILES[part])
    flag = f"--{part.replace('_', '-')}"
    for precision in ("fp32", "bf16", "int8"):
        wanted = [item for graph in GRAPHS[part] for item in ("--component", graph)]
        assert main(["export", "-q", "-d", str(root), "--precision", precision, flag, str(file), *wanted]) == 0
    export(floats, precision="fp32", components=GRAPHS[part])
    for graph in GRAPHS[part]:
        expected = run_graph(floats, graph, "fp32", **inputs(graph))
        for precision, most in (("fp32", GRAPH_TOLERANCE), ("bf16", ROUNDED), ("int8", ROUNDED)):
            assert relative_error(run_graph(root, graph, precision, **inputs(graph)), expected) < most


def test_the_integers_stay_in_int8_builds(checkpoints, tmp_path):
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))
    stored, _, _ = quantised(load_file(root / FILES["text_encoder"]), "tensor")
    file = tmp_path / "int8.safetensors"
    save_file(stored, file)
    export(root, text_encoder=file, precision="int8", components=["text_encoder"])
    found = load_file(root / "text_encoder/int8.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    written = found[name].astype(np.int16) - (128 if found[name].dtype == np.uint8 else 0)
    np.testing.assert_array_equal(written, stored[name].T)


def test_the_originals_names(checkpoints, tmp_path):
    """Attention that is written as convolutions of one pixel."""
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))
    tensors = load_file(root / FILES["vae"])
    stored, meant, _ = quantised(formats.ldm_names(tensors), "tensor")
    files = [tmp_path / "int8.safetensors", tmp_path / "floats.safetensors"]
    save_file({name: np.ascontiguousarray(array) for name, array in stored.items()}, files[0])
    save_file({name: np.ascontiguousarray(array) for name, array in meant.items()}, files[1])
    found = []
    for file in files:
        export(root, vae=file, precision="fp32", components=["vae_encoder"], renew=True)
        found.append(run_graph(root, "vae_encoder", "fp32", **inputs("vae_encoder")))
    assert relative_error(found[0], found[1]) < GRAPH_TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": None}, "is I8, but has no scale"),
        ({"weight": np.zeros((2, 2, 2), np.int8)}, r"is I8 \[2, 2, 2\], but int8_tensorwise is I8 \[out, in\]"),
        ({"comfy_quant": {"format": "int8_tensorwise", "convrot": True}}, "is rotated, but it is no matrix"),
        ({"comfy_quant": {"format": "int4_something"}}, "quantised as int4_something"),
    ],
)
def test_unreadable_files(checkpoints, tmp_path, fails, changes, message):
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))
    stored, _, _ = quantised(load_file(root / FILES["vae"]), "tensor")
    for parameter, value in changes.items():
        name = f"decoder.conv_in.{parameter}"
        if isinstance(value, dict):
            stored[name] = np.frombuffer(json.dumps(value).encode(), np.uint8)
        elif value is None:
            del stored[name]
        else:
            stored[name] = value
    file = tmp_path / "broken.safetensors"
    save_file(stored, file)
    fails(1, message, "export", "-d", root, "--vae", file)
