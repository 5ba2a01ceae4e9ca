"""The portable graphs mean the same to runtimes other than onnxruntime."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.contract import COMPONENTS
from tests.conformance.runtimes import RUNTIMES, missing
from tests.support import GRAPH_TOLERANCE, Case, golden_inputs, golden_outputs, relative_error

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
WITHOUT_VAE = ("text_encoder", "conditioning", "transformer")


def graph_of(checkpoints, component: str, precision: str) -> Path:
    return checkpoints.exported(CASE, precision, "portable") / graph_file(component, precision, "portable")


def agrees(checkpoints, runtime: str, component: str, precision: str) -> None:
    """Compare a runtime with the golden values, if it is installed."""
    if lacking := missing(runtime):
        pytest.skip(f"{', '.join(lacking)} not installed")
    if runtime == "reference" and component not in WITHOUT_VAE:
        pytest.skip("convolutions of the reference evaluator take minutes at this size")
    found = RUNTIMES[runtime].run(graph_of(checkpoints, component, precision), golden_inputs(component))
    for output, expected in zip(found, golden_outputs(component), strict=True):
        assert relative_error(output, expected) < GRAPH_TOLERANCE


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_float32(checkpoints, runtime, component):
    """Golden values of diffusers in every runtime that is installed."""
    agrees(checkpoints, runtime, component, "fp32")


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("runtime", ["reference", "openvino", "opencv", "node", "web"])
def test_bfloat16(checkpoints, runtime, component):
    """Runtimes that know bfloat16 widen it to the same float32 values."""
    agrees(checkpoints, runtime, component, "bf16")


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
