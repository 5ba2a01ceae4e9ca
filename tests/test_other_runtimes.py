"""The portable graphs mean the same to runtimes other than onnxruntime."""

from __future__ import annotations

import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.contract import COMPONENTS
from tests.support import GRAPH_TOLERANCE, Case, golden_inputs, golden_outputs, optional, relative_error

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("component", ["text_encoder", "conditioning", "transformer"])
def test_onnx_reference_evaluator(checkpoints, precision, component):
    """ONNX's own definition of each operator, in numpy; the VAE is left out, since its convolutions take minutes."""
    root = checkpoints.exported(CASE, precision, "portable")
    model = onnx.load(root / graph_file(component, precision, "portable"))
    found = ReferenceEvaluator(model).run(None, golden_inputs(component))
    for output, expected in zip(found, golden_outputs(component), strict=True):
        assert relative_error(output, expected) < GRAPH_TOLERANCE


@optional("openvino")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_openvino(checkpoints, precision, component):
    """In float32; its default on some machines is bfloat16."""
    import openvino

    root = checkpoints.exported(CASE, precision, "portable")
    file = root / graph_file(component, precision, "portable")
    model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = model(golden_inputs(component))
    for name, expected in zip(model.outputs, golden_outputs(component), strict=True):
        assert relative_error(result[name], expected) < GRAPH_TOLERANCE
