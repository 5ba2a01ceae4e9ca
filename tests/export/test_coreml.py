"""Static graphs of the 4B model's sizes, by the table of CoreML's operators: each is one piece."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fluxonnx.checkpoint.manifest import Shape
from fluxonnx.checkpoint.safetensors import DTYPES, Tensor
from fluxonnx.contract import Architecture, open_checkpoint
from fluxonnx.export.components import build_graph, make_target, read_architecture
from tests.coreml import TABLE, verdict
from tools.architectures import ARCHITECTURES

# Where integers come in: the embeddings are looked up in a table of 151,936 rows, and the mask becomes floats.
ON_CPU = {"text_encoder": ["Cast", "Gather"]}


def tensors(component: str) -> dict[str, Tensor]:
    """The 4B model's tensors, of a file that is not there."""
    sizes = ARCHITECTURES["4b"]
    shapes = {"text_encoder": sizes.text_encoder, "transformer": sizes.transformer}.get(component, sizes.vae).shapes()
    found = {}
    for name, shape in shapes.items():
        dtype = "I64" if name.endswith("num_batches_tracked") else "BF16"
        count = int(np.prod(shape, dtype=int))
        found[name] = Tensor(name, dtype, tuple(shape), Path("weights"), 0, count * DTYPES[dtype].itemsize)
    return found


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> Architecture:
    folder = tmp_path_factory.mktemp("configs")
    model = ARCHITECTURES["4b"]
    configs = {"text_encoder": model.text_encoder.config("bfloat16"), "transformer": model.transformer.config()}
    for name, values in {**configs, "vae": model.vae.config()}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}))
    return read_architecture(open_checkpoint(folder), None)


def built(component: str, sizes: Architecture, precision: str, shape: Shape) -> onnx.ModelProto:
    target = make_target(precision, "portable", None, shape=shape)
    return build_graph(component, sizes, target, tensors(component), {"model": "x"}).model


@pytest.mark.slow
@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae_encoder", "vae_decoder"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_graphs_are_whole(sizes, component, precision):
    model = built(component, sizes, precision, Shape(512, 512, 512))
    found = verdict(model)
    assert sorted(node.op_type for node, _ in found.refused) == ON_CPU.get(component, [])
    assert found.partitions == 1
    weights = [tensor for tensor in model.graph.initializer if "embed_tokens" not in tensor.name]
    assert max(size for tensor in weights for size in tensor.dims) <= TABLE["largest_dimension"]


@pytest.mark.slow
def test_whole_up_to_a_million_pixels(sizes):
    """The attention of the autoencoder sees an eighth of each side at once: 128 * 128 is the largest dimension."""
    assert verdict(built("vae_decoder", sizes, "fp16", Shape(1024, 1024, 512))).refused == []


def test_what_the_table_refuses():
    """The walk itself: an operator, a dimension, a cast of an input, a computed bound; and what is left between."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("wide", TensorProto.FLOAT, [1, 20000]),
    ]
    nodes = [
        helper.make_node("Cast", ["ids"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "a"], ["b"]),
        helper.make_node("Abs", ["b"], ["c"]),
        helper.make_node("Add", ["c", "x"], ["d"]),
        helper.make_node("Slice", ["d", "ids", "ids"], ["e"]),
        helper.make_node("Sqrt", ["wide"], ["f"]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ef"]
    model = helper.make_model(
        helper.make_graph(nodes, "x", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)]
    )
    found = verdict(model)
    assert [(node.op_type, reason) for node, reason in found.refused] == [
        ("Cast", "its input is made by no node"),
        ("Abs", "no such operator"),
        ("Slice", "input 1 is no constant"),
        ("Sqrt", "input 0 is [1, 20000]"),
    ]
    assert found.partitions == 2
