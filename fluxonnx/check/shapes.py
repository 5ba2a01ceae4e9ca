"""The shapes of all values of a graph in numbers, for inputs of a given size.

ONNX's own inference is asked node by node, with what `Shape` and arithmetic on it amount to filled in: in a whole
graph it follows such numbers only into some operators. Operators of com.microsoft, which it does not know, have rules
here; the graph's `value_info` says the rest.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, numpy_helper
from onnx.reference import ReferenceEvaluator

Shape = tuple[int, ...]

ARITHMETIC: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
}
# A name of a dimension longer than this is no arithmetic of ours.
LONGEST = 100
# Constants of at most this many values may decide a shape.
SMALL = 4096
# Results of at most this many values are computed, by operators whose results are no larger than what they take.
COMPUTED = 64
BOUNDED = (
    *(
        "Abs",
        "Add",
        "Cast",
        "Ceil",
        "Concat",
        "Div",
        "Equal",
        "Floor",
        "Gather",
        "Identity",
        "Max",
        "Min",
        "Mod",
        "Mul",
    ),
    *("Neg", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Slice", "Sqrt", "Squeeze", "Sub"),
    *("Unsqueeze", "Where"),
)
# numpy has no more dimensions.
MOST_DIMENSIONS = 64


def evaluate(name: str, dims: Mapping[str, int]) -> int | None:
    """Return the number that a dimension's name stands for, which may be a sum such as `text_seq + image_seq`."""
    if name in dims:
        return dims[name]
    if len(name) > LONGEST:
        return None
    try:
        return _value(ast.parse(name, mode="eval").body, dims)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, dims: Mapping[str, int]) -> int:
    if isinstance(node, ast.Name):
        return dims[node.id]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](_value(node.left, dims), _value(node.right, dims))
    raise ValueError("no arithmetic of whole numbers")


def shapes(model: onnx.ModelProto, dims: Mapping[str, int]) -> tuple[dict[str, Shape], dict[str, int], list[str]]:
    """Return the shapes that are known in numbers, the symbols used for that, and those of inputs without a number.

    Args:
        model: The graph; it is not changed. External data are not looked at.
        dims: Numbers for symbolic dimensions.
    """
    walk = _Walk(model, dims)
    for node in model.graph.node:
        walk.step(node)
    found = {}
    for name, kind in walk.types.items():
        sizes = kind.tensor_type.shape.dim
        known = kind.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in sizes)
        if known and len(sizes) <= MOST_DIMENSIONS:
            found[name] = tuple(dim.dim_value for dim in sizes)
    return found, walk.used, walk.free


class _Walk:
    """Types and small constants, from the inputs of a graph to its outputs."""

    def __init__(self, model: onnx.ModelProto, dims: Mapping[str, int]) -> None:
        self.types: dict[str, TypeProto] = {}
        self.used: dict[str, int] = {}
        self.free: list[str] = []
        self._dims = dims
        self._opsets = {item.domain or "": item.version for item in model.opset_import}
        self._imports = list(model.opset_import)
        self._constants: dict[str, TensorProto] = {}
        graph = model.graph
        self._told = {item.name: self._bound(item.type) for item in (*graph.value_info, *graph.output)}
        for tensor in graph.initializer:
            self.types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            if tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= SMALL:
                self._constants[tensor.name] = tensor
        for item in graph.input:
            if item.name not in self.types:
                self.types[item.name] = self._bound(item.type)
                for dim in self.types[item.name].tensor_type.shape.dim:
                    name = dim.dim_param or "a dimension without a name"
                    if not dim.HasField("dim_value") and name not in self.free:
                        self.free.append(name)

    def _bound(self, kind: TypeProto) -> TypeProto:
        """Return a type with numbers in the place of symbols."""
        bound = TypeProto()
        bound.CopyFrom(kind)
        for dim in bound.tensor_type.shape.dim if bound.HasField("tensor_type") else ():
            if dim.dim_param:
                name = dim.dim_param
                number = evaluate(name, self._dims)
                if number is not None and 0 <= number < 2**62:
                    dim.dim_value = number
                    self.used[name] = number
        return bound

    def step(self, node: onnx.NodeProto) -> None:
        """Find the types of a node's outputs."""
        found: Mapping[str, TypeProto] = {}
        with suppress(Exception):  # damaged nodes, operators of later versions: their outputs stay unknown
            found = self._inferred(node)
        for name in filter(None, node.output):
            kind = merged(found.get(name), self._told.get(name))
            if kind is not None:
                self.types[name] = kind
        with suppress(Exception):
            self._compute(node)

    def _inferred(self, node: onnx.NodeProto) -> Mapping[str, TypeProto]:
        known = {name: self.types[name] for name in node.input if name in self.types}
        if node.domain not in ("", "ai.onnx"):
            sizes = [_sizes(known[name]) if name in known else None for name in node.input]
            kind = known[node.input[0]].tensor_type.elem_type
            attributes = {item.name: item.i for item in node.attribute}
            shape = MICROSOFT[node.op_type](sizes, attributes)
            return {node.output[0]: onnx.helper.make_tensor_type_proto(kind, shape)}
        schema = onnx.defs.get_schema(node.op_type, self._opsets[""], "")
        data = {name: self._constants[name] for name in node.input if name in self._constants}
        return onnx.shape_inference.infer_node_outputs(schema, node, known, data, opset_imports=self._imports)

    def _compute(self, node: onnx.NodeProto) -> None:
        """Compute a small result of a shape or of constants, which may decide the shapes of others."""
        if len(node.output) != 1 or node.domain not in ("", "ai.onnx"):
            return
        if node.op_type == "Constant":
            tensor = next((item.t for item in node.attribute if item.name == "value"), None)
            if tensor is not None and math.prod(tensor.dims) <= SMALL:
                self._constants[node.output[0]] = tensor
            return
        if node.op_type == "Shape":
            sizes = [size for size in _sizes(self.types[node.input[0]]) if size is not None]
            if len(sizes) < len(self.types[node.input[0]].tensor_type.shape.dim):
                return
            feeds = {node.input[0]: np.broadcast_to(np.float32(0), sizes)}
        elif node.op_type in BOUNDED and all(name in self._constants for name in node.input if name):
            feeds = {name: numpy_helper.to_array(self._constants[name]) for name in node.input if name}
            if any(value.size > COMPUTED for value in feeds.values()):
                return
        else:
            return
        outputs: Any = ReferenceEvaluator(node, opsets=self._opsets).run(None, feeds)
        value = np.asarray(outputs[0])
        if value.size <= COMPUTED:
            self._constants[node.output[0]] = numpy_helper.from_array(value)


def merged(first: TypeProto | None, second: TypeProto | None) -> TypeProto | None:
    """Return a type with the sizes that either one knows."""
    if first is None or not first.tensor_type.HasField("shape"):
        return second or first
    if second is not None and len(first.tensor_type.shape.dim) == len(second.tensor_type.shape.dim):
        for ours, theirs in zip(first.tensor_type.shape.dim, second.tensor_type.shape.dim, strict=True):
            if not ours.HasField("dim_value") and theirs.HasField("dim_value"):
                ours.dim_value = theirs.dim_value
    return first


def _sizes(kind: TypeProto) -> list[int | None]:
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim]


# Shapes of the first outputs, from those of the inputs and integer attributes.
# Source: docs/ContribOperators.md of onnxruntime.
Sizes = Sequence[Any]


def _like_first(sizes: Sizes, attributes: Mapping[str, int]) -> list:
    return sizes[0]


def _product(sizes: Sizes, attributes: Mapping[str, int]) -> list:
    return [*sizes[0][:-1], sizes[1][-2 if attributes.get("transB") else -1]]


def _packed_product(sizes: Sizes, attributes: Mapping[str, int]) -> list:
    return [*sizes[0][:-1], attributes["N"]]


def _attention(sizes: Sizes, attributes: Mapping[str, int]) -> list:
    value = sizes[2]
    return [*sizes[0][:2], value[1] * value[3] if len(value) == 4 else value[2]]


MICROSOFT: dict[str, Callable[[Sizes, Mapping[str, int]], list]] = {
    **dict.fromkeys(
        (
            "QuickGelu",
            "Gelu",
            "FastGelu",
            "BiasGelu",
            "RotaryEmbedding",
            "SkipLayerNormalization",
            "SimplifiedLayerNormalization",
            "SkipSimplifiedLayerNormalization",
            "GroupNorm",
            "QuantizeLinear",
            "DequantizeLinear",
        ),
        _like_first,
    ),
    **dict.fromkeys(("FusedMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), _product),
    "MatMulNBits": _packed_product,
    "MultiHeadAttention": _attention,
}
