"""Where a graph multiplies by the weight of a layer: what goes in, what comes out, and how both lie in memory.

Graphs are read as the exporter writes them (`export/precisions/`): the weight goes through casts, slices and scales
into a product; the activations of 8-bit products are rounded before it, and those of float16 ones divided.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from fluxonnx.contract import FIRST_ROWS
from fluxonnx.errors import CheckpointError

PRODUCTS = ("Gemm", "MatMul", "MatMulNBits", "MatMulIntegerToFloat", "MatMulInteger")
# What follows a product of integers until it is the layer's output in float32.
COMPLETED_BY = {"MatMulIntegerToFloat": ("Mul",), "MatMulInteger": ("Cast", "Mul", "Mul")}
# The same of a product of float16.
HALF_COMPLETED_BY = ("Cast", "Mul")


@dataclass(frozen=True)
class Input:
    """Some columns of a layer's input, float32: [rows, width], or [panels, rows, width / panels]."""

    value: str
    width: int
    panels: int = 1


@dataclass(frozen=True)
class Product:
    """A product with rows of a layer's weight.

    Attributes:
        node: The node that multiplies.
        start: The first row of the product in the layer's weight.
        size: How many rows.
        panels: In how many panels the output lies.
        inputs: What is multiplied, side by side.
        completion: The nodes behind it that make the output, if the product alone does not.
        output: float32 [rows, size], or [panels, rows, size / panels].
        floats: Whether the weight, the second input of the node, is a float32 value: [size, in].
        flipped: Whether that value is [in, size].
        adds_to_weight: Whether a matrix may be added to that value.
    """

    node: onnx.NodeProto
    start: int
    size: int
    panels: int
    inputs: tuple[Input, ...]
    completion: tuple[onnx.NodeProto, ...]
    output: str
    floats: bool
    flipped: bool
    adds_to_weight: bool


class Layout:
    """The nodes of a graph by what they make and read."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Look at a graph."""
        graph = model.graph
        facts = {item.key: item.value for item in model.metadata_props}
        self._first_rows = first_rows(facts)
        self.producer = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._types = {info.name: info.type for info in (*graph.value_info, *graph.input, *graph.output)}
        self._weights: dict[str, list[tuple[tuple[int, ...], str]]] = defaultdict(list)
        for name in self.initializers:
            if match := re.fullmatch(r"(.+)\.weight((?:\.\d+)*)", name):
                self._weights[match[1]].append((tuple(int(n) for n in match[2].split(".")[1:]), name))

    def products(self, path: str) -> Iterator[Product]:
        """Yield the products with the weight of a layer; none if the graph does not have it.

        Raises:
            CheckpointError: The graph is not as the exporter wrote it.
        """
        start = 0
        for _, name in sorted(self._weights.get(path, ())):
            start, size = self._first_rows.get(name, start), 0
            for node, offset, rows, narrow in self._uses(name):
                size = max(size, offset + rows)
                yield self._product(node, narrow, name, start + offset, rows)
            start += size

    def read(self, product: Product, inputs: Mapping[str, str]) -> list[onnx.NodeProto]:
        """Have a product read other inputs; others that read the same ones are left alone.

        Args:
            product: The product.
            inputs: What takes the place of its inputs, by their names.

        Returns:
            Copies of the nodes between its inputs and itself, which have to be added to the graph.
        """
        chain = (product.node, *product.completion)
        known = {**inputs, **{value: value for node in chain for value in node.output}}
        twins: list[onnx.NodeProto] = []

        def copied(value: str) -> str:
            """Return what a value is with these inputs: itself, if it does not depend on them."""
            node = self.producer.get(value)
            if value in known or node is None:
                return known.get(value, value)
            names = [copied(name) for name in node.input]
            if names == list(node.input):
                known[value] = value
                return value
            twin = onnx.NodeProto()
            twin.CopyFrom(node)
            twin.name = f"{node.name}/for{product.node.name}"
            del twin.input[:], twin.output[:]
            twin.input.extend(names)
            twin.output.extend(f"{name}/for{product.node.name}" for name in node.output)
            twins.append(twin)
            known.update(zip(node.output, twin.output, strict=True))
            return known[value]

        for node in chain:
            names = [copied(name) for name in node.input]
            del node.input[:]
            node.input.extend(names)
        return twins

    def _uses(self, name: str) -> Iterator[tuple[onnx.NodeProto, int, int, bool]]:
        """Yield the products that a weight goes into: node, first row, rows, whether it is half."""
        tensor = self.initializers[name]
        ways = [(name, 0, int(tensor.dims[0]), tensor.data_type == TensorProto.FLOAT16)]
        while ways:
            value, offset, rows, narrow = ways.pop(0)
            for node in self.readers[value]:
                if node.op_type in COMPLETED_BY:  # [in, out], or [panels, in, out / panels]
                    yield node, 0, math.prod(tensor.dims) // int(tensor.dims[-2]), False
                elif node.op_type in PRODUCTS:
                    yield node, offset, rows, narrow
                elif node.op_type == "Cast":
                    ways.append((node.output[0], offset, rows, narrow and attribute(node, "to") != TensorProto.FLOAT))
                elif node.op_type == "Slice":
                    first, end = (int(numpy_helper.to_array(self.initializers[node.input[i]])[0]) for i in (1, 2))
                    ways.append((node.output[0], offset + first, end - first, narrow))
                elif node.op_type in ("Mul", "Transpose", "DequantizeLinear"):
                    ways.append((node.output[0], offset, rows, narrow))

    def _product(self, node: onnx.NodeProto, narrow: bool, stored: str, start: int, size: int) -> Product:
        dims = self.initializers[stored].dims
        integer = node.op_type in COMPLETED_BY
        completion = self._followed(node, HALF_COMPLETED_BY if narrow else COMPLETED_BY.get(node.op_type, ()))
        inputs = self._float_inputs(node.input[0]) if integer or narrow else (Input(node.input[0], 0),)
        plain = not integer and not narrow and node.op_type in ("Gemm", "MatMul")
        return Product(
            node=node,
            start=start,
            size=size,
            panels=int(dims[0]) if integer and len(dims) == 3 else 1,
            inputs=inputs,
            completion=completion,
            output=str((node, *completion)[-1].output[0]),
            floats=plain,
            flipped=node.op_type == "MatMul",
            adds_to_weight=plain,
        )

    def _followed(self, node: onnx.NodeProto, types: tuple[str, ...]) -> tuple[onnx.NodeProto, ...]:
        found = []
        for type in types:
            readers = self.readers[node.output[0]]
            if [reader.op_type for reader in readers] != [type]:
                raise _foreign(node)
            node = readers[0]
            found.append(node)
        return tuple(found)

    def _float_inputs(self, rounded: str) -> tuple[Input, ...]:
        """Return what was rounded to integers or divided to float16, before it was rotated; side by side."""
        node = self._made_by(rounded)
        if node.op_type == "Concat":
            return tuple(part for value in node.input for part in self._float_inputs(value))
        if node.op_type == "Reshape":  # panels that are joined
            node = self._made_by(node.input[0], "Transpose")
            (inner,) = self._float_inputs(node.input[0])
            return (inner,)
        if node.op_type == "Cast":  # of a portable graph, or to float16
            node = self._made_by(node.input[0])
            if node.op_type == "Round":
                node = self._made_by(node.input[0], "Div")
        if node.op_type not in ("QuantizeLinear", "Div"):
            raise _foreign(node)
        return (self._input(self._unrotated(node.input[0])),)

    def _unrotated(self, value: str) -> str:
        """Return what was multiplied by a Hadamard matrix in groups; the value itself if it was not."""
        back = self.producer.get(value)
        product = self.producer.get(back.input[0]) if back is not None and back.op_type == "Reshape" else None
        if product is None or product.op_type != "MatMul" or product.input[1] not in self.initializers:
            return value
        return str(self._made_by(product.input[0], "Reshape").input[0])

    def _input(self, value: str) -> Input:
        type = self._types.get(value)
        dims = [dim.dim_value for dim in type.tensor_type.shape.dim] if type is not None else []
        if len(dims) == 3 and dims[0] and dims[2]:
            return Input(value, dims[0] * dims[2], dims[0])
        return Input(value, dims[-1] if dims else 0)

    def _made_by(self, value: str, op_type: str | None = None) -> onnx.NodeProto:
        node = self.producer.get(value)
        if node is None or (op_type and node.op_type != op_type):
            raise CheckpointError(f"the graph is not as fluxonnx wrote it ({value}): export again with --force")
        return node


def ordered(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Sort nodes so that each comes behind those whose outputs it reads; others keep their order."""
    makers = {name: i for i, node in enumerate(nodes) for name in node.output}
    done: set[int] = set()
    found: list[onnx.NodeProto] = []
    for start in range(len(nodes)):
        stack = [start]
        while stack:
            i = stack[-1]
            waiting = [makers[name] for name in nodes[i].input if name in makers and makers[name] not in done]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if i not in done:
                done.add(i)
                found.append(nodes[i])
    return found


def first_rows(facts: Mapping[str, str]) -> dict[str, int]:
    """Return at which row of a layer's weight the parts begin of which a graph lacks those before, by their names.

    Raises:
        CheckpointError: What the graph says of itself is damaged.
    """
    try:
        return {name: int(row) for name, row in json.loads(facts.get(FIRST_ROWS, "{}")).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f'the graph has damaged metadata ("{FIRST_ROWS}"): export again with --force') from None


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """Return an attribute of a node; None if it has none of this name."""
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), None)


def _foreign(node: onnx.NodeProto) -> CheckpointError:
    return CheckpointError(f"the graph is not as fluxonnx wrote it ({node.name}): export again with --force")
