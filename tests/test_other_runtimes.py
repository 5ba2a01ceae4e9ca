"""The portable graphs mean the same to runtimes other than onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.contract import COMPONENTS
from tests.support import GRAPH_TOLERANCE, Case, golden_inputs, golden_outputs, optional, relative_error

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
WITHOUT_VAE = ("text_encoder", "conditioning", "transformer")


def graph_of(checkpoints, component: str, precision: str) -> Path:
    return checkpoints.exported(CASE, precision, "portable") / graph_file(component, precision, "portable")


def with_weights(path: Path, target: Path, static: bool = False) -> Path:
    """Write a graph whose weights are inside, and whose dimensions are those of the golden values if `static`."""
    model = onnx.load(path)
    component = path.name.partition(".")[0]
    if static:
        arrays = [*golden_inputs(component).values(), *golden_outputs(component)]
        for value, array in zip((*model.graph.input, *model.graph.output), arrays, strict=True):
            for dim, size in zip(value.type.tensor_type.shape.dim, array.shape, strict=True):
                dim.dim_value = size
    onnx.save(model, target)
    return target


def check(component: str, found: Sequence[np.ndarray], tolerance: float = GRAPH_TOLERANCE) -> None:
    for output, expected in zip(found, golden_outputs(component), strict=True):
        assert relative_error(output, expected) < tolerance


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("component", WITHOUT_VAE)
def test_onnx_reference_evaluator(checkpoints, precision, component):
    """ONNX's own definition of each operator, in numpy; the VAE is left out, since its convolutions take minutes."""
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(graph_of(checkpoints, component, precision))
    check(component, ReferenceEvaluator(model).run(None, golden_inputs(component)))


@optional("openvino")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_openvino(checkpoints, precision, component):
    """In float32; its default on some machines is bfloat16."""
    import openvino

    file = graph_of(checkpoints, component, precision)
    model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = model(golden_inputs(component))
    check(component, [result[output] for output in model.outputs])


@optional("tract")
@pytest.mark.parametrize("component", COMPONENTS)
def test_tract(checkpoints, tmp_path, component):
    """With any sizes; the VAE with fixed ones, since tract takes minutes to plan it otherwise."""
    import tract

    static = component not in WITHOUT_VAE
    file = with_weights(graph_of(checkpoints, component, "fp32"), tmp_path / "graph.onnx", static)
    model = tract.onnx().load(str(file)).into_model().into_runnable()
    check(component, [output.to_numpy() for output in model.run(list(golden_inputs(component).values()))])


@optional("cv2")
@pytest.mark.parametrize("component", COMPONENTS)
def test_opencv(checkpoints, tmp_path, component):
    import cv2

    file = with_weights(graph_of(checkpoints, component, "fp32"), tmp_path / "graph.onnx")
    net = cv2.dnn.readNetFromONNX(str(file))
    for name, value in golden_inputs(component).items():
        net.setInput(value, name)
    names = [output.name for output in onnx.load(file).graph.output]
    check(component, net.forward(names))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_graphs_keep_to_what_others_know(checkpoints, precision):
    """What runtimes were seen to stumble over; bf16 graphs have the checkpoint's bfloat16, and the rest in common."""
    for component in COMPONENTS:
        model = onnx.load(graph_of(checkpoints, component, precision), load_external_data=False)
        graph = model.graph
        assert not graph.value_info
        assert {node.domain for node in graph.node} == {""}
        for value in (*graph.input, *graph.output):
            for dim in value.type.tensor_type.shape.dim:
                assert dim.dim_value or dim.dim_param.isidentifier(), (component, value.name)
        assert TensorProto.BFLOAT16 not in {tensor.data_type for tensor in graph.initializer}
        assert not any(
            attribute.name == "to" and attribute.i == TensorProto.BFLOAT16
            for node in graph.node
            for attribute in node.attribute
        )
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        assert all(name in read for node in graph.node for name in node.output), component
        ranks = [
            len(value.type.tensor_type.shape.dim) for value in onnx.shape_inference.infer_shapes(model).graph.value_info
        ]
        assert max(ranks) <= 4, component
