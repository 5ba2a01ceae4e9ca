"""The portable graphs mean the same to runtimes other than onnxruntime."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.contract import COMPONENTS
from tests.conformance import tables
from tests.conformance.picture import Runtime, difference
from tests.conformance.runtimes import IN_CI, RUNTIMES, missing, run
from tests.support import GRAPH_TOLERANCE, IMAGE_TOLERANCE, Case, golden_inputs, golden_outputs, relative_error

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
IS_CI = bool(os.environ.get("FLUXONNX_NO_SKIPPED_PARITY"))
WITHOUT_VAE = ("text_encoder", "conditioning", "transformer")


def graph_of(checkpoints, component: str, precision: str) -> Path:
    return checkpoints.exported(CASE, precision, "portable") / graph_file(component, precision, "portable")


def needs(runtime: str) -> None:
    """Skip a test whose runtime is not installed; in CI those that it runs have to be."""
    if lacking := missing(runtime):
        assert runtime not in IN_CI or not IS_CI, f"{', '.join(lacking)} not installed"
        pytest.skip(f"{', '.join(lacking)} not installed")


def agrees(checkpoints, runtime: str, component: str, precision: str) -> None:
    """Compare a runtime with the golden values, if it is installed."""
    needs(runtime)
    if runtime == "reference" and component not in WITHOUT_VAE:
        pytest.skip("convolutions of the reference evaluator take minutes at this size")
    if runtime == "webgpu" and component != "conditioning":
        pytest.skip("a software adapter takes minutes for the shaders of the others")
    found = run(runtime, graph_of(checkpoints, component, precision), golden_inputs(component))
    for output, expected in zip(found, golden_outputs(component), strict=True):
        assert relative_error(output, expected) < GRAPH_TOLERANCE


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_float32(checkpoints, runtime, component):
    """Golden values of diffusers in every runtime that is installed."""
    agrees(checkpoints, runtime, component, "fp32")


# left out: the reference evaluator and the software adapter take minutes; tests of examples draw with the others
@pytest.mark.parametrize("runtime", [name for name in IN_CI if name not in ("reference", "webgpu", "wasm", "node")])
def test_whole_picture(checkpoints, runtime):
    """The same picture with another runtime in the place of onnxruntime."""
    needs(runtime)
    folder = checkpoints.exported(CASE, "fp32", "portable")
    assert difference(folder, "fp32", Runtime(runtime)) <= IMAGE_TOLERANCE


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("runtime", ["reference", "openvino", "opencv", "wasm"])
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


def test_tables_are_those_of_the_results():
    """docs/runtimes.md was not written by hand, and not forgotten."""
    page = tables.PAGE.read_text("utf-8")
    assert page == tables.with_tables(page, tables.read_results())
