"""The openblas provider on our own graphs: every operator is known, results agree with onnxruntime's in float32."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import fluxonnx
from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.contract import COMPONENTS
from fluxonnx.openblas.graph import FOLDED, Graph
from fluxonnx.openblas.plan import unknown
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.events import OperatorsTimed
from fluxonnx.runtime.session import Session
from tests.support import (
    GRAPH_TOLERANCE,
    IMAGE_TOLERANCE,
    Case,
    golden_inputs,
    golden_outputs,
    optional,
    relative_error,
    run_graph,
)

pytestmark = [pytest.mark.slow, optional("threadpoolctl")]

CASE = Case("odd-heads")
PRECISIONS = ("bf16", "fp32", "fp16", "int8", "int4")
# Where operands are rounded to 16 or fewer bits, a value near the middle falls on either side.
ROUNDED = {"fp16": 3e-3, "int8": 3e-3, "int4": 1e-2}


def inputs_of(component: str, batch: int, tokens: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Inputs of a graph of `CASE` at another size than the golden ones."""
    rng = np.random.default_rng(7)
    known = golden_inputs(component)
    image = height * width // 4
    sizes = {
        "input_ids": (batch, tokens),
        "attention_mask": (batch, tokens),
        "hidden_states": (batch, image),
        "encoder_hidden_states": (batch, tokens),
        "rotary_cos": (tokens + image,),
        "rotary_sin": (tokens + image,),
        "sample": (batch, 3, 16 * height, 16 * width),
        "latents": (batch, known["latents"].shape[1], height, width) if "latents" in known else (),
        "txt_ids": (tokens,),
        "img_ids": (image,),
    }
    found = {}
    for name, like in known.items():
        shape = sizes.get(name, (1,))
        shape = (*shape, *like.shape[len(shape) :])
        if like.dtype == np.int64:
            found[name] = rng.integers(0, 60, shape)
        else:
            found[name] = rng.standard_normal(shape).astype(np.float32)
    if component == "text_encoder":
        found["attention_mask"] = (np.arange(tokens)[None] < [[tokens]] * (batch - 1) + [[tokens - 3]]).astype(np.int64)
    if component == "transformer":
        angle = rng.standard_normal((tokens + image, known["rotary_cos"].shape[1] // 2)).repeat(2, axis=-1)
        found["rotary_cos"], found["rotary_sin"] = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
    return found


def outputs_of(root, component: str, precision: str, flavour: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    graph = Graph(root / graph_file(component, precision, flavour), threads=2)
    try:
        graph.run(inputs)
        return graph.run(inputs)  # in memory that the first run has used
    finally:
        graph.close()


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_operator_is_known_and_agrees(checkpoints, precision, flavour):
    root = checkpoints.exported(CASE, precision, flavour)
    for component in COMPONENTS:
        file = root / graph_file(component, precision, flavour)
        assert unknown(onnx.load(file, load_external_data=False)) == []
        inputs = golden_inputs(component)
        (found, *_), expected = outputs_of(root, component, precision, flavour, inputs), golden_outputs(component)[0]
        tolerance = ROUNDED.get(precision, GRAPH_TOLERANCE)
        if precision in ROUNDED:  # of the weights' rounding, golden values know nothing
            expected = run_graph(root, component, precision, flavour)
        assert relative_error(found, expected) < tolerance, component


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("size", [(1, 40, 4, 4), (2, 9, 6, 10)])
def test_other_sizes(checkpoints, precision, size):
    root = checkpoints.exported(CASE, precision)
    for component in COMPONENTS:
        inputs = inputs_of(component, *size)
        found = outputs_of(root, component, precision, "ort", inputs)[0]
        with Session(root / graph_file(component, precision, "ort"), component, SessionOptions()) as session:
            assert relative_error(found, session.run(**inputs)[0]) < GRAPH_TOLERANCE, component


def test_written_out_attention_is_computed_in_blocks(checkpoints):
    """In portable graphs: no score of all heads, no Softmax on its own."""
    root = checkpoints.exported(CASE, "bf16", "portable")
    for component in ("text_encoder", "transformer", "vae_decoder"):
        graph = Graph(root / graph_file(component, "bf16", "portable"), threads=1)
        types = [step.node.type for step in graph.plan.steps]
        graph.close()
        assert "Softmax" not in types
        assert "Attention" in types


def test_weights_stay_in_the_checkpoint(checkpoints):
    """Of a bf16 build, all but small weights are neither copied nor widened when the graph is loaded."""
    root = checkpoints.exported(CASE, "bf16")
    graph = Graph(root / graph_file("transformer", "bf16", "ort"), threads=1)
    large = [value for value in graph.constants.values() if value.size > FOLDED]
    assert large
    for value in large:
        assert value.dtype.name == "bfloat16"
        assert isinstance(value, np.memmap)
    graph.close()


def test_picture_is_that_of_the_cpu_provider(checkpoints):
    root = checkpoints.exported(CASE, "bf16")
    pictures = []
    for provider in ("cpu", "openblas"):
        with fluxonnx.load(root, provider=provider) as flux:
            pictures.append(np.asarray(flux.generate("a cat", 64, 96, 2, seed=1), np.int16))
    assert np.abs(pictures[0] - pictures[1]).max() <= IMAGE_TOLERANCE


def test_profile_names_operators(checkpoints):
    root = checkpoints.exported(CASE, "bf16")
    events: list[object] = []
    with fluxonnx.load(root, provider="openblas", profile=True, watch=events.append) as flux:
        flux.generate("a cat", 64, 64, 1, seed=1)
    timed = {event.component: event for event in events if isinstance(event, OperatorsTimed)}
    assert set(timed) == {"text_encoder", "conditioning", "transformer", "vae_decoder"}
    assert "Gemm" in {operator.type for operator in timed["transformer"].operators}
