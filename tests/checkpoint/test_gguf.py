"""GGUF: every weight is what the package `gguf` makes of it; 4- and 8-bit blocks stay the same integers."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from fluxonnx import api
from fluxonnx.checkpoint.encoded import Encoded
from fluxonnx.checkpoint.formats import native_precision, resolve
from fluxonnx.checkpoint.gguf import BLOCK_TYPES, read_gguf
from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.cli import main
from fluxonnx.contract import open_checkpoint
from fluxonnx.errors import CheckpointError
from fluxonnx.export import export
from tests import comfyui, formats
from tests.support import Case, optional, relative_error, run_graph

pytestmark = optional("gguf")

CASE = Case("odd-heads", "fp32")
# All rows are whole blocks.
SMALL = Case("tiny-random", "fp32")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
KINDS = ["F32", "F16", "BF16", *(block.name for block in BLOCK_TYPES.values())]


def original(root: Path) -> dict[str, np.ndarray]:
    return comfyui.original_names(load_file(root / TRANSFORMER))


def test_sizes_are_the_packages():
    import gguf

    for number, block in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (block.name, (block.values, block.size))


@pytest.mark.parametrize("kind", KINDS)
def test_values(tmp_path, kind):
    """Of wide rows, whole and in parts."""
    random = np.random.RandomState(0)
    tensors = {
        "double_blocks.0.img_attn.qkv.weight": random.randn(48, 512).astype(np.float32) / 20,
        "final_layer.adaLN_modulation.1.weight": random.randn(40, 256).astype(np.float32) / 20,
        "double_blocks.0.img_attn.norm.query_norm.scale": random.randn(32).astype(np.float32),
    }
    file = tmp_path / "w.gguf"
    values = formats.write_gguf(file, tensors, kind)
    found = resolve(read_gguf(file)[0])
    qkv, swapped, norm = values.values()
    for i, name in enumerate("qkv"):
        tensor = found[f"transformer_blocks.0.attn.to_{name}.weight"]
        assert (tensor.shape, tensor.file) == ((16, 512), file)
        np.testing.assert_array_equal(tensor.array().astype(np.float32), qkv[16 * i : 16 * i + 16])
        np.testing.assert_array_equal(tensor.rows(3, 9).astype(np.float32), qkv[16 * i + 3 : 16 * i + 9])
        if isinstance(tensor, Encoded) and tensor.blocks:
            integers, scales = tensor.unpacked()
            assert np.abs(integers).max() <= 2 ** (tensor.blocks.bits - 1)
            products = (integers.reshape(*scales.shape, -1) * scales[..., None]).reshape(16, 512)
            np.testing.assert_array_equal(products, qkv[16 * i : 16 * i + 16])
    last = found["norm_out.linear.weight"]
    expected = np.concatenate([swapped[20:], swapped[:20]])
    np.testing.assert_array_equal(last.array().astype(np.float32), expected)
    for start, end in ((0, 40), (5, 15), (15, 30), (25, None)):
        np.testing.assert_array_equal(last.rows(start, end).astype(np.float32), expected[start:end])
    np.testing.assert_array_equal(found["transformer_blocks.0.attn.norm_q.weight"].array(), norm)


@pytest.mark.parametrize(("architecture", "prefix"), [("flux", ""), ("flux2", ""), (None, "model.diffusion_model.")])
def test_names_of_transformers(checkpoints, tmp_path, architecture, prefix):
    """As city96's and unsloth's tools write them, and stable-diffusion.cpp."""
    root = checkpoints.get(CASE)
    file = tmp_path / "flux-2-klein.gguf"
    formats.write_gguf(file, original(root), "F32", architecture, prefix)
    found = open_checkpoint(root, file).tensors("transformer")
    expected = open_checkpoint(root).tensors("transformer")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.array(), expected[name].array())
        assert tensor.is_plain == (name != "norm_out.linear.weight")


@pytest.mark.parametrize("case", [CASE, Case("head-dim-64", "fp32")], ids=lambda case: case.id)
def test_names_of_text_encoders(checkpoints, tmp_path, case):
    """As llama.cpp writes them."""
    root = checkpoints.get(case)
    file = tmp_path / "qwen3.gguf"
    tensors = load_file(root / "text_encoder/model.safetensors")
    formats.write_gguf(file, formats.llama_names(tensors), "F32", "qwen3")
    found = open_checkpoint(root, text_encoder=file).tensors("text_encoder")
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.array(), tensors[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "kind", "precision", "flavour"),
    [
        ("transformer", "Q8_0", "int8", "ort"),
        ("transformer", "Q4_0", "int4", "ort"),
        ("transformer", "Q4_0", "int8", "portable"),
        ("text_encoder", "Q8_0", "int8", "portable"),
        ("text_encoder", "Q4_0", "int4", "portable"),
        ("text_encoder", "Q4_0", "int8", "ort"),
    ],
)
def test_blocks_are_kept(copy_of, tmp_path, component, kind, precision, flavour):
    """The build computes with the values of the file: as near as rounding of activations lets it come."""
    root = copy_of(SMALL)
    if component == "transformer":
        tensors = original(root)
    else:
        tensors = formats.llama_names(load_file(root / "text_encoder/model.safetensors"))
    file = tmp_path / "part.gguf"
    values = formats.write_gguf(file, tensors, kind)
    plain = formats.write(tmp_path / "values.safetensors", values)
    inputs = inputs_of(component)
    export(root, components=[component], precision="fp32", **{component: plain})
    exact = run_graph(root, component, "fp32", **inputs)
    export(root, components=[component], precision=precision, flavour=flavour, **{component: file})
    assert relative_error(run_graph(root, component, precision, flavour, **inputs), exact) < 6e-3
    if flavour == "ort":
        model = onnx.load(root / graph_file(component, precision, flavour), load_external_data=False)
        products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        assert len(products) > 10
        for node in products:
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            assert (sizes["bits"], sizes["block_size"]) == (int(kind[1]), 32)


def inputs_of(component: str) -> dict[str, np.ndarray]:
    """Inputs of a graph of `SMALL`."""
    random = np.random.RandomState(0)
    if component == "text_encoder":
        return {"input_ids": random.randint(0, 300, (1, 9)), "attention_mask": np.ones((1, 9), np.int64)}
    shapes = {"hidden_states": (1, 6, 32), "encoder_hidden_states": (1, 5, 96), "timestep_proj": (1, 256)}
    normal = {name: random.randn(*shape).astype(np.float32) for name, shape in shapes.items()}
    angles = np.repeat(random.rand(11, 16), 2, -1).astype(np.float32)
    return {**normal, "rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("Q5_0", "bf16"), ("Q8_0", "int4"), ("Q4_1", "int8")])
def test_other_builds_say_what_they_do(copy_of, tmp_path, capsys, kind, precision):
    root = copy_of(CASE)
    file = tmp_path / f"klein-{kind}.gguf"
    values = formats.write_gguf(file, original(root), kind)
    arguments = ["export", "-d", str(root), "--transformer", str(file), "--component", "transformer"]
    assert main([*arguments, "--precision", precision]) == 0
    what = "converted" if precision == "bf16" else "rounded again"
    assert re.search(rf"{kind}\.gguf: \d+ matrices \(\d+ {kind}\) are {what} to {precision}", capsys.readouterr().err)
    plain = formats.write(tmp_path / "values.safetensors", values)
    export(root, components=["transformer"], precision="fp32", transformer=plain)
    limit = {"bf16": 4e-3, "int8": 0.03, "int4": 0.2}[precision]
    error = relative_error(run_graph(root, "transformer", precision), run_graph(root, "transformer", "fp32"))
    assert error < limit


@pytest.mark.parametrize(("kind", "expected"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q5_1", "bf16"), ("BF16", "bf16")])
def test_default_precision(checkpoints, tmp_path, kind, expected):
    """Blocks that a build can keep are kept unless another precision is asked for."""
    root = checkpoints.get(CASE)
    formats.write_gguf(tmp_path / "a.gguf", original(root), kind)
    checkpoint = open_checkpoint(root, tmp_path / "a.gguf")
    assert api.default_precision(checkpoint) == expected
    assert native_precision(checkpoint.tensors("transformer")) == (expected if expected != "bf16" else None)


def test_without_the_package(tmp_path, monkeypatch):
    """4- and 8-bit blocks and floats need no package; others say which."""
    tensors = {"double_blocks.0.img_mlp.0.weight": np.ones((4, 256), np.float32)}
    for kind in ("F16", "Q8_0", "Q4_0", "Q6_K"):
        formats.write_gguf(tmp_path / f"{kind}.gguf", tensors, kind)
    monkeypatch.setattr("fluxonnx.checkpoint.gguf.find_spec", lambda name: None)
    for kind in ("F16", "Q8_0", "Q4_0"):
        (tensor,) = read_gguf(tmp_path / f"{kind}.gguf")[0].values()
        np.testing.assert_allclose(tensor.array().astype(np.float32), 1, rtol=0.01)
    with pytest.raises(
        CheckpointError, match=r"blocks of Q6_K .* needs the package gguf: pip install fluxonnx\[gguf\]"
    ):
        read_gguf(tmp_path / "Q6_K.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*tensors: tuple, entries: bytes = b"", count: int = 0, version: int = 3) -> bytes:
    """A header by hand: tensors are (name, dimensions, type, offset)."""
    listed = b"".join(
        text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        for name, shape, kind, offset in tensors
    )
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), count) + entries + listed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "no whole GGUF file"),
        (header(version=1), "version 1, but fluxonnx reads 2 and 3"),
        (header(("w", (4,), 0, 0)), "truncated"),
        (header(("w", (4,), 16, 0)) + bytes(100), "w is IQ2_XXS, which fluxonnx can't read"),
        (header(("w", (4,), 999, 0)) + bytes(100), "w is of type 999"),
        (header(("w", (33,), 8, 0)) + bytes(100), "no whole blocks of 32"),
        (header(("w", (4,), 0, 0), ("w", (4,), 0, 0)) + bytes(100), "holds w twice"),
        (header(("w", (1,) * 20, 0, 0)) + bytes(100), "malformed"),
        (header(("w", (1 << 50,), 0, 0)) + bytes(100), "malformed"),
        (header(count=5), "malformed"),
        (header(entries=text("a") + struct.pack("<I", 77), count=1) + bytes(100), "malformed"),
        (header(entries=text("a") + struct.pack("<IIQ", 9, 8, 1 << 60), count=1) + bytes(100), "malformed"),
        (header(entries=text("a") + struct.pack("<IIQ", 9, 9, 3) * 9, count=1) + bytes(100), "malformed"),
        (header(entries=text("general.alignment") + struct.pack("<II", 4, 0), count=1) + bytes(100), "malformed"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(100), "malformed"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1 << 40) + bytes(100), "malformed"),
    ],
)
def test_damaged_headers(checkpoints, tmp_path, content, message):
    file = tmp_path / "w.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(checkpoints.get(CASE), file).tensors("transformer")
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_truncation(tmp_path):
    """A file that is cut anywhere is never read as another one."""
    file = tmp_path / "w.gguf"
    formats.write_gguf(file, {"a.weight": np.ones((2, 32), np.float32), "b": np.ones(3, np.float32)}, "Q8_0")
    content = file.read_bytes()
    last = max(tensor.offset + tensor.nbytes for tensor in read_gguf(file)[0].values())
    for length in range(4, last):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_gguf(file)


def test_damaged_bytes(tmp_path):
    """Whatever is wrong in a header: one line of ours, or tensors that lie in the file."""
    file = tmp_path / "w.gguf"
    tensors = {
        "double_blocks.0.img_mlp.0.weight": np.ones((2, 32), np.float32),
        "img_in.weight": np.ones(3, np.float32),
    }
    formats.write_gguf(file, tensors, "Q8_0")
    content, random = file.read_bytes(), np.random.RandomState(0)
    for _ in range(200):
        damaged = bytearray(content)
        for at in random.randint(4, len(content), random.randint(1, 4)):
            damaged[at] = random.choice([0, 1, 255, random.randint(256)])
        file.write_bytes(damaged)
        try:
            found = resolve(read_gguf(file)[0])
        except CheckpointError:
            continue
        for tensor in found.values():
            tensor.array()
