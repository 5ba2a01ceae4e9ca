"""Which nodes of a graph onnxruntime's CoreML provider takes, by its table and not on a Mac."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, shape_inference

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "golden/coreml_operators.json").read_text("utf-8"))


@dataclass(frozen=True)
class Value:
    """A value of a graph: its ONNX type, its sizes (None for one that is no number), and where it comes from."""

    dtype: str
    shape: tuple[int | None, ...] | None
    is_constant: bool
    has_node: bool


@dataclass(frozen=True)
class Verdict:
    """What CoreML makes of a graph.

    Attributes:
        refused: The nodes that it does not take, and why.
        partitions: The pieces that the nodes it takes fall into.
    """

    refused: list[tuple[onnx.NodeProto, str]]
    partitions: int


def verdict(model: onnx.ModelProto) -> Verdict:
    """Walk a graph."""
    values = _values(model)
    refused = []
    # how often the way to a value has left CoreML after it was in it, and whether the value is made by CoreML
    depth: dict[str, tuple[int, bool]] = {}
    pieces = set()
    for node in model.graph.node:
        reason = _refusal(node, values)
        before = [depth[name] for name in node.input if name in depth]
        if reason:
            refused.append((node, reason))
            level = max((found + taken for found, taken in before), default=0)
        else:
            level = max((found for found, _ in before), default=0)
            pieces.add(level)
        depth.update(dict.fromkeys(node.output, (level, reason is None)))
    return Verdict(refused, len(pieces))


def _values(model: onnx.ModelProto) -> dict[str, Value]:
    graph = shape_inference.infer_shapes(model).graph
    made = {name for node in graph.node for name in node.output}
    found = {
        tensor.name: Value(TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims), True, False)
        for tensor in graph.initializer
    }
    for info in (*graph.input, *graph.value_info, *graph.output):
        kind = info.type.tensor_type
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
        dtype = TensorProto.DataType.Name(kind.elem_type)
        found[info.name] = Value(dtype, shape if kind.HasField("shape") else None, False, info.name in made)
    return found


def _refusal(node: onnx.NodeProto, values: dict[str, Value]) -> str | None:
    """Return why CoreML does not take a node; None if it does."""
    rule = TABLE["operators"].get(node.op_type)
    if node.domain or rule is None:
        return "no such operator"
    given = {i: values.get(name) for i, name in enumerate(node.input) if name}
    for i, value in given.items():
        if value is None or value.shape is None or None in value.shape:
            return f"input {i} has no fixed shape"
        if len(value.shape) > TABLE["largest_rank"] or max(value.shape, default=0) > TABLE["largest_dimension"]:
            return f"input {i} is {list(value.shape)}"
        if i in rule.get("constant_inputs", ()) and not value.is_constant:
            return f"input {i} is no constant"
    first, result = given[0], values[node.output[0]]
    assert first is not None
    assert first.shape is not None
    if first.dtype not in rule.get("types", TABLE["types"]):
        return f"type {first.dtype}"
    if result.dtype not in rule.get("output_types", rule.get("types", TABLE["types"])):
        return f"result of type {result.dtype}"
    if result.shape is None or len(result.shape) > TABLE["largest_rank"]:
        return "rank of the result"
    if "ranks" in rule and len(first.shape) not in rule["ranks"]:
        return f"rank {len(first.shape)}"
    if rule.get("input_of_a_node") and not first.has_node:
        return "its input is made by no node"
    if len(node.input) < rule.get("least_inputs", 0) or len(node.output) < rule.get("least_outputs", 0):
        return "too few inputs or outputs"
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    for name, wanted in rule.get("attributes", {}).items():
        if attributes.get(name, b"").decode() != wanted:
            return f"{name} is {attributes.get(name)}"
    return None
