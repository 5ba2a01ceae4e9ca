"""From the file of a graph to what is computed in which order: nodes checked, constants folded, last uses found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fluxonnx.errors import FluxonnxError
from fluxonnx.openblas import ops
from fluxonnx.openblas.call import FUSED, OPERATORS, Node
from fluxonnx.openblas.weights import Files

__all__ = ["Input", "Plan", "Step", "ops", "plan", "read"]

# Operators that meant something else in older opsets, or took attributes where they take inputs now. Before opset 7
# operands were broadcast only if an attribute said so.
OLDEST_OPSET = 6
OLDEST = {
    **dict.fromkeys(("Add", "And", "Div", "Equal", "Gemm", "Greater", "Less", "Mul", "Or", "Sub", "Xor"), 7),
    **{"Not": 1, "Max": 8, "Min": 8, "Slice": 10, "Resize": 11, "Pad": 11, "Softmax": 13},
}


@dataclass(frozen=True)
class Input:
    """What a graph takes: a name, a dtype, and sizes, of which None and names stand for any."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Step:
    """A node, and the values that nothing reads after it: its inputs by place, and names to be forgotten."""

    node: Node
    dying: frozenset[int]
    forgotten: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A graph as it is computed."""

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Any]
    steps: tuple[Step, ...]


def read(path: Path) -> onnx.ModelProto:
    """Read a graph's file.

    Raises:
        FluxonnxError: It can't be read, or is no ONNX file.
    """
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise FluxonnxError(f"{path} can't be read: {error.strerror or error}") from None
    except Exception:  # protobuf's errors have no base that it exports
        raise FluxonnxError(f"{path} is no ONNX file: export again with --force") from None


def plan(model: onnx.ModelProto, folder: Path) -> Plan:
    """Decide how a graph is computed.

    Args:
        model: The graph; its external data is not loaded.
        folder: Where that lies.

    Raises:
        FluxonnxError: An operator, an opset or a constant is not supported, or external data is missing.
    """
    graph, files = model.graph, Files(folder)
    opsets = {entry.domain.replace("ai.onnx", ""): entry.version for entry in model.opset_import}
    if model.functions:
        raise FluxonnxError(f"the graph {graph.name} has functions of its own, which are not supported")
    if graph.sparse_initializer:
        raise FluxonnxError(f"the graph {graph.name} has sparse constants, which are not supported")
    constants = {tensor.name: files.constant(tensor) for tensor in graph.initializer}
    nodes = [_node(proto, opsets, i) for i, proto in enumerate(graph.node)]
    inputs = tuple(_input(value) for value in graph.input if value.name not in constants)
    outputs = tuple(value.name for value in graph.output)
    nodes = _with_attention(nodes, outputs)
    _check_order(nodes, {*constants, *(value.name for value in inputs)}, outputs)
    return Plan(graph.name, inputs, outputs, constants, steps(nodes, outputs))


def unknown(model: onnx.ModelProto) -> list[str]:
    """Return the operators of a graph that are not known here, as domain.type."""
    types = {(node.domain.replace("ai.onnx", ""), node.op_type) for node in model.graph.node}
    return sorted(f"{domain}.{type}".lstrip(".") for domain, type in types - OPERATORS.keys())


def described(node: Node) -> str:
    """Name a node for a person."""
    return f"the node {node.name or node.outputs[0]} ({node.type})"


def _node(proto: onnx.NodeProto, opsets: Mapping[str, int], place: int) -> Node:
    domain = proto.domain.replace("ai.onnx", "")
    name = proto.name or (proto.output[0] if proto.output else f"number {place}")
    if (domain, proto.op_type) not in OPERATORS or domain == FUSED:
        what = f"{domain}.{proto.op_type}" if domain else proto.op_type
        raise FluxonnxError(
            f"the node {name} is a {what}, which the openblas provider does not know: use --provider cpu"
        )
    if not domain and opsets.get("", OLDEST_OPSET) < OLDEST.get(proto.op_type, OLDEST_OPSET):
        raise FluxonnxError(
            f"the node {name} is a {proto.op_type} of opset {opsets['']}; the oldest supported is "
            f"{OLDEST.get(proto.op_type, OLDEST_OPSET)}"
        )
    return Node(
        name, proto.op_type, domain, opsets.get(domain, 1), tuple(proto.input), tuple(proto.output),
        {attribute.name: _value(attribute, name) for attribute in proto.attribute},
    )  # fmt: skip


def _value(attribute: onnx.AttributeProto, node: str) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        raise FluxonnxError(f"the node {node} has graphs of its own, which are not supported")
    return list(value) if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS) else value


def _input(value: onnx.ValueInfoProto) -> Input:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type in (0, onnx.TensorProto.STRING):
        raise FluxonnxError(f"the input {value.name} is no tensor of numbers, which is not supported")
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(
            size.dim_value if size.HasField("dim_value") else size.dim_param or None for size in tensor.shape.dim
        )
    return Input(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def _check_order(nodes: Iterable[Node], known: set[str], outputs: Iterable[str]) -> None:
    """Check that each value is computed before it is read."""
    seen = {*known, ""}
    for node in nodes:
        for name in node.inputs:
            if name not in seen:
                raise FluxonnxError(f"{described(node)} reads {name}, which nothing before it computes: export again")
        seen.update(node.outputs)
    for name in outputs:
        if name not in seen:
            raise FluxonnxError(f"the output {name} is computed by no node: export again")


def steps(nodes: list[Node], outputs: Iterable[str]) -> tuple[Step, ...]:
    """Find the last use of each value."""
    kept = set(outputs)
    last: dict[str, int] = {}
    for i, node in enumerate(nodes):
        last.update(dict.fromkeys((*node.outputs, *node.inputs), i))
    found = []
    for i, node in enumerate(nodes):
        gone = {name for name in (*node.inputs, *node.outputs) if name and last[name] == i and name not in kept}
        dying = frozenset(place for place, name in enumerate(node.inputs) if name in gone)
        found.append(Step(node, dying, tuple(sorted(gone))))
    return tuple(found)


def _with_attention(nodes: list[Node], outputs: Iterable[str]) -> list[Node]:
    """Put one operator where attention is written out, whose scores would be as large as queries times keys.

    What is looked for: MatMul, then possibly Cast and Add of a bias, Softmax over the last axis, possibly Cast, MatMul;
    all values between them are read once.
    """
    maker = {output: node for node in nodes for output in node.outputs}
    readers = Counter(name for node in nodes for name in node.inputs)
    readers.update(outputs)
    reader = {name: node for node in nodes for name in node.inputs}

    def only(name: str, *types: str) -> Node | None:
        """Return what makes a value that is read once."""
        node = maker.get(name)
        return node if node is not None and readers[name] == 1 and node.type in types and not node.domain else None

    replaced: dict[str, Node] = {}
    left_out: set[str] = set()
    for softmax in nodes:
        if softmax.type != "Softmax" or softmax.attributes.get("axis", -1) not in (-1, 3):
            continue
        inside, bias, value = [softmax], "", softmax.inputs[0]
        if added := only(value, "Add"):
            scores = next((name for name in added.inputs if only(name, "MatMul", "Cast")), None)
            if scores is None:
                continue
            bias = next((name for name in added.inputs if name != scores), "")
            inside, value = [*inside, added], scores
        if cast := only(value, "Cast"):
            inside, value = [*inside, cast], cast.inputs[0]
        first, after = only(value, "MatMul"), softmax
        narrowed = reader.get(softmax.outputs[0])
        if narrowed is not None and narrowed.type == "Cast" and readers[softmax.outputs[0]] == 1:
            after = narrowed
            inside.append(after)
        last = reader.get(after.outputs[0])
        if first is None or last is None or readers[after.outputs[0]] != 1 or last.type != "MatMul":
            continue
        if last.inputs[0] == after.outputs[0]:
            inputs = (*first.inputs, last.inputs[1], *([bias] if bias else []))
            replaced[last.outputs[0]] = replace(last, type="Attention", domain=FUSED, inputs=inputs)
            left_out.update(node.outputs[0] for node in (*inside, first))
    return [replaced.get(node.outputs[0], node) for node in nodes if node.outputs[0] not in left_out]
