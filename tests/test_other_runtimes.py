"""The portable graphs mean the same to runtimes other than onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from fluxonnx.manifest import graph_file
from tests.conftest import Case
from tests.test_golden import GOLDEN, GRAPHS, TOLERANCE

CASE = Case("odd-heads")

EXPECTED = {
    **GRAPHS,
    "transformer": (("hidden_states", "timestep_proj", "rotary_cos", "rotary_sin"), ("velocity",)),
    "vae_decoder": (("latents",), ("decoded",)),
}


def inputs_of(component: str) -> dict[str, np.ndarray]:
    inputs = {name: GOLDEN[name] for name in EXPECTED[component][0]}
    if component == "transformer":
        inputs["encoder_hidden_states"] = GOLDEN["prompt_embeds"]
    return inputs


def assert_equals_golden(component: str, outputs: list[np.ndarray]) -> None:
    for found, name in zip(outputs, EXPECTED[component][1], strict=True):
        assert found.shape == GOLDEN[name].shape
        assert np.linalg.norm(found - GOLDEN[name]) < TOLERANCE * np.linalg.norm(GOLDEN[name])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("component", ["text_encoder", "conditioning", "transformer"])
def test_onnx_reference_evaluator(checkpoints, precision, component):
    """ONNX's own definition of each operator, in numpy; the VAE is left out, since its convolutions take minutes."""
    root = checkpoints.exported(CASE, precision, "portable")
    model = onnx.load(root / graph_file(component, precision, "portable"))
    assert_equals_golden(component, ReferenceEvaluator(model).run(None, inputs_of(component)))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("component", EXPECTED)
def test_openvino(checkpoints, precision, component):
    """In float32; its default on some machines is bfloat16."""
    openvino = pytest.importorskip("openvino")
    root = checkpoints.exported(CASE, precision, "portable")
    core = openvino.Core()
    model = core.compile_model(
        root / graph_file(component, precision, "portable"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    result = model(inputs_of(component))
    assert_equals_golden(component, [result[name] for name in model.outputs])
