"""What a static graph does not need: nodes that compute with constants alone, and nodes that nothing reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator


def computed(
    op_type: str,
    inputs: Sequence[str],
    given: Sequence[onnx.TensorProto],
    outputs: int,
    attributes: Mapping[str, Any],
    opset: onnx.OperatorSetIdProto,
    ir_version: int,
) -> list[np.ndarray]:
    """Return what a node computes from constants.

    Args:
        op_type: The operator, of ai.onnx.
        inputs: The names of its inputs.
        given: The constants of these names.
        outputs: How many outputs it has.
        attributes: Its attributes.
        opset: The opset of ai.onnx.
        ir_version: The version of the format.
    """
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, list(inputs), names, **attributes)
    results = [helper.make_empty_tensor_value_info(name) for name in names]
    graph = helper.make_graph([node], "constants", [], results, list(given))
    model = helper.make_model(graph, opset_imports=[opset], ir_version=ir_version)
    return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, {})]


def needed(nodes: Sequence[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes that some values depend on, in their order."""
    wanted, found = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(node)
    return found[::-1]
