"""A graph builder over `onnx.helper`: names, scopes, shared constants, weights and shapes.

A value is its name, a plain string. Types are inferred as nodes are added: a mistake shows at the line that made it,
and every value of the finished graph has a type. The builder knows nothing of precisions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, shape_inference

from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.contract import FIRST_ROWS
from fluxonnx.errors import CheckpointError
from fluxonnx.export.folding import computed, needed
from fluxonnx.export.initializers import Encode, Entry, Part, StoredWeight, View, first_rows, onnx_dtype, scaled
from fluxonnx.ports import Port, plain_symbol

MICROSOFT = "com.microsoft"

Dim = int | str | None
T = TypeVar("T")


@dataclass
class Graph:
    """A finished graph: the model without its weights, and where each weight comes from.

    `errors` and `kept` are those of `precisions.Prepared`.
    """

    model: onnx.ModelProto
    weights: list[StoredWeight]
    used: set[str]
    parameters: int
    errors: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


class GraphBuilder:
    """Builds one graph from a table of checkpoint tensors.

    Attributes:
        name: The graph's name.
        opset: The ai.onnx opset.
        fused: Whether onnxruntime's own operators (com.microsoft) may be used.
        static: Whether all sizes are numbers: what depends on sizes alone is computed here, and becomes a constant.
        used: Names of the tensors taken so far.
        arithmetic: The ONNX type that takes the place of float32 between the inputs and the outputs.
    """

    def __init__(
        self,
        name: str,
        flavour: str,
        opset: int,
        tensors: dict[str, Tensor] | None = None,
        dims: Mapping[str, int] | None = None,
        arithmetic: int = TensorProto.FLOAT,
    ) -> None:
        """Start an empty graph.

        Args:
            name: Its name.
            flavour: "ort" for onnxruntime, "portable" for ai.onnx operators only.
            opset: The ai.onnx opset.
            tensors: The checkpoint's tensors by name.
            dims: What the symbolic dimensions of inputs and outputs are in a static graph; None for any.
            arithmetic: The ONNX type to compute in.
        """
        self.name, self.opset, self.fused, self.arithmetic = name, opset, flavour == "ort", arithmetic
        self.static, self._dims = dims is not None, dims or {}
        self._tensors = tensors or {}
        self.used: set[str] = set()
        self._opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        self._ir_version = helper.find_min_ir_version_for([self._opsets[0]])
        self._scopes: list[str] = []
        self._nodes: list[onnx.NodeProto] = []
        self._weight_nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, StoredWeight] = {}
        self._shared: dict[Hashable, Any] = {}
        self._constants: dict[str, onnx.TensorProto] = {}
        self._types: dict[str, onnx.TypeProto] = {}
        self._names: dict[str, int] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    # Names

    @contextmanager
    def scope(self, *parts: object) -> Iterator[None]:
        """Enter a module: `scope("transformer_blocks", 3)` is `transformer_blocks.3` of the checkpoint."""
        self._scopes.append(".".join(str(part) for part in parts))
        try:
            yield
        finally:
            self._scopes.pop()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Leave all modules, for nodes that belong to none."""
        scopes, self._scopes = self._scopes, []
        try:
            yield
        finally:
            self._scopes = scopes

    def path(self, name: str) -> str:
        """Return the checkpoint's name of a parameter of the module in scope."""
        return ".".join([*self._scopes, name])

    def _unique(self, name: str) -> str:
        full = "/" + "/".join([*self._scopes, name])
        count = self._names.get(full, 0)
        self._names[full] = count + 1
        return full if count == 0 else f"{full}_{count}"

    # Values

    def input(self, port: Port) -> str:
        """Declare an input of the graph; floats are returned in the type that it computes in."""
        info = self._value_info(port)
        self._inputs.append(info)
        self._types[port.name] = info.type
        is_float = info.type.tensor_type.elem_type == TensorProto.FLOAT
        return self.cast(port.name, self.arithmetic) if is_float else port.name

    def _value_info(self, port: Port) -> onnx.ValueInfoProto:
        """Describe an input or output; other runtimes take arithmetic in the name of a dimension for a mistake."""
        shape: list[Dim] = [self._dims.get(dim, dim) if isinstance(dim, str) else dim for dim in port.shape]
        if not self.fused:
            shape = [plain_symbol(dim) if isinstance(dim, str) else dim for dim in shape]
        return helper.make_tensor_value_info(port.name, onnx_dtype(port.dtype), shape, port.doc)

    def output(self, port: Port, value: str) -> None:
        """Declare `value` an output of the graph."""
        dtype = onnx_dtype(port.dtype)
        assert self.dtype(value) in (dtype, self.arithmetic), port
        with self.outside():
            if self.dtype(value) == dtype:
                self.op("Identity", value, output=port.name)
            else:
                self.op("Cast", value, output=port.name, to=dtype)
        self._outputs.append(self._value_info(port))

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Return a constant, by default of the type of the graph's arithmetic; equal constants are one initializer."""
        if dtype is None:
            dtype = helper.tensor_dtype_to_np_dtype(self.arithmetic)
        array = np.ascontiguousarray(np.asarray(value, dtype)).reshape(np.shape(value))
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:12] if array.size > 4 else ""
        label = digest or "_".join(str(item) for item in array.ravel().tolist())
        name = f"constant/{array.dtype}/{'x'.join(map(str, array.shape))}/{label}"
        if name not in self._constants:
            tensor = onnx.numpy_helper.from_array(array, name)
            self._constants[name] = tensor
            self._types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        return name

    def op(
        self,
        op_type: str,
        *inputs: str,
        shape: Sequence[Dim] | None = None,
        like: str | None = None,
        domain: str = "",
        output: str | None = None,
        outputs: int = 1,
        **attributes: Any,
    ) -> Any:
        """Add a node.

        Args:
            op_type: The operator.
            *inputs: Values; "" for an optional input left out.
            shape: The output's shape where inference can't see it (a reshape to computed sizes).
            like: A value whose type the output has, for operators outside ai.onnx, whose types onnx can't infer.
            domain: The operator's domain.
            output: A name for the output instead of the node's own.
            outputs: How many outputs it has.
            **attributes: The operator's attributes.

        Returns:
            The output's name, or a list of them when there are several.
        """
        if self.static and output is None and (folded := self._folded(op_type, inputs, outputs, domain, attributes)):
            return folded[0] if outputs == 1 else folded
        name = self._unique(op_type)
        names = [output or name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        node = helper.make_node(op_type, list(inputs), names, name=name, domain=domain, **attributes)
        inferred = dict.fromkeys(names, self._types[like]) if like is not None else self._infer(node)
        for value in names:
            self._types[value] = inferred[value]
            if shape is not None and not (self.static and like is None and self._is_known(value)):
                dtype = inferred[value].tensor_type.elem_type
                self._types[value] = helper.make_tensor_type_proto(dtype, list(shape))
        self._nodes.append(node)
        return names[0] if outputs == 1 else names

    def _folded(
        self, op_type: str, inputs: Sequence[str], outputs: int, domain: str, attributes: dict[str, Any]
    ) -> list[str] | None:
        """Return what a node computes as constants, if it depends on nothing but constants and known sizes."""
        if op_type == "Shape" and self._is_known(inputs[0]):
            shape = np.asarray(self.shape(inputs[0]), np.int64)
            return [self.constant(shape[attributes.get("start", 0) : attributes.get("end")], np.int64)]
        if domain or not inputs or any(name and name not in self._constants for name in inputs):
            return None
        given = [self._constants[name] for name in dict.fromkeys(inputs) if name]
        values = computed(op_type, inputs, given, outputs, attributes, self._opsets[0], self._ir_version)
        return [self.constant(value, value.dtype) for value in values]

    def _is_known(self, value: str) -> bool:
        """Whether all sizes of a value are numbers."""
        kind = self._types[value].tensor_type
        return kind.HasField("shape") and all(isinstance(size, int) for size in self.shape(value))

    def _infer(self, node: onnx.NodeProto) -> dict[str, onnx.TypeProto]:
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        return shape_inference.infer_node_outputs(
            schema,
            node,
            {name: self._types[name] for name in node.input if name},
            {name: self._constants[name] for name in node.input if name in self._constants},
            opset_imports=self._opsets,
            ir_version=self._ir_version,
        )

    def shape(self, value: str) -> list[Dim]:
        """Return a value's shape; symbolic dimensions are strings, unknown ones None."""
        dims = self._types[value].tensor_type.shape.dim
        return [dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in dims]

    def width(self, value: str) -> int:
        """Return the size of a value's last dimension, which is known for every input of a linear layer."""
        return self.sizes(value, 1)[0]

    def sizes(self, value: str, count: int) -> list[int]:
        """Return the sizes of a value's last `count` dimensions, which must be known."""
        sizes = [size for size in self.shape(value)[-count:] if isinstance(size, int)]
        assert len(sizes) == count, value
        return sizes

    def dtype(self, value: str) -> int:
        """Return a value's ONNX type."""
        return self._types[value].tensor_type.elem_type

    def cast(self, value: str, dtype: int) -> str:
        """Return a value as another ONNX type; itself if it has that type."""
        return value if self.dtype(value) == dtype else self.op("Cast", value, to=dtype)

    def reduce(self, op_type: str, value: str, axes: Sequence[int]) -> str:
        """Apply ReduceMax or ReduceMean and keep the axes, which are an attribute before opset 18."""
        if self.opset >= 18:
            return self.op(op_type, value, self.constant(axes, np.int64), keepdims=1)
        return self.op(op_type, value, axes=list(axes), keepdims=1)

    # Weights

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """Take a parameter of the module in scope out of the checkpoint.

        Raises:
            CheckpointError: It is missing or has another shape; the message has its name and both shapes.
        """
        path = self.path(name)
        tensor = self._tensors.get(path)
        if tensor is None:
            raise CheckpointError(
                f"{self.name}: tensor {path} is missing, expected shape {list(shape)}: "
                "config.json and weights do not belong together"
            )
        if tensor.shape != tuple(shape):
            raise CheckpointError(
                f"{self.name}: tensor {path} has shape {list(tensor.shape)}, expected {list(shape)}: "
                "config.json and weights do not belong together"
            )
        self.used.add(path)
        return tensor

    def stored(self, tensor: Tensor, dtype: str, in_place: bool) -> str:
        """Return an initializer of `dtype` for `tensor`, whose bytes may stay `in_place` if they are of that dtype."""
        if tensor.scaling:
            self.encoded(tensor, [Part("", dtype, tensor.shape)], lambda source: [scaled(source, dtype)])
        elif tensor.name not in self._weights:
            entry = self._entry(tensor.name, dtype, tensor.shape, onnx_dtype(dtype), tensor.shape)
            in_place = in_place and dtype == tensor.dtype and tensor.is_plain
            self._weights[tensor.name] = StoredWeight(tensor, [entry], None, in_place)
        return tensor.name

    def encoded(self, tensor: Tensor, parts: Sequence[Part], encode: Encode) -> None:
        """Store the arrays that `encode` makes of `tensor`, each under the tensor's name and its part's suffix."""
        if tensor.name not in self._weights:
            entries = [
                self._entry(tensor.name + part.suffix, part.dtype, part.shape, part.onnx_dtype, part.onnx_shape)
                for part in parts
            ]
            self._weights[tensor.name] = StoredWeight(tensor, entries, encode, in_place=False)

    def aliases(self, name: str, count: int) -> list[str]:
        """Return `count` more initializers with the bytes of initializer `name`.

        onnxruntime rejects a graph in which two products share a weight that it has to make unsigned.
        """
        (entry,) = (e for weight in self._weights.values() for e in weight.entries if e.initializer.name == name)
        made = [f"{name}.alias{len(entry.aliases) + i}" for i in range(count)]
        for alias in made:
            entry.aliases.append(TensorProto())
            entry.aliases[-1].CopyFrom(entry.initializer)
            entry.aliases[-1].name = alias
            self._types[alias] = self._types[name]
        return made

    def _view(self, name: str, first: int, count: int) -> str:
        """Return an initializer for `count` rows of the weight `name`, from row `first` on."""
        view = f"{name}[{first}:{first + count}]"
        if view not in self._types:
            entry = self._weights[name].entries[0]
            shape = (count, *entry.shape[1:])
            self._types[view] = helper.make_tensor_type_proto(entry.initializer.data_type, shape)
            tensor = TensorProto(name=view, data_type=entry.initializer.data_type, dims=shape)
            entry.views.append(
                View(tensor, first * entry.nbytes // entry.shape[0], count * entry.nbytes // entry.shape[0])
            )
        return view

    def _entry(
        self, name: str, dtype: str, shape: tuple[int, ...], graph_dtype: int, graph_shape: tuple[int, ...]
    ) -> Entry:
        self._types[name] = helper.make_tensor_type_proto(graph_dtype, graph_shape)
        return Entry(TensorProto(name=name, data_type=graph_dtype, dims=graph_shape), dtype, shape)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returned for this key the first time; for values that several layers share."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def weight_op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node that only prepares a weight.

        Such nodes come first in the graph: onnxruntime visits inputs by falling node index, so a cast that precedes
        everything runs right before its consumer, while one placed beside its consumer is hoisted before the whole
        chain and all weights are live at once (measured: 1 GB against 18 GB on the 4B transformer).
        """
        value = self.op(op_type, *inputs, **attributes)
        self._weight_nodes.append(self._nodes.pop())
        return value

    def weight_rows(self, value: str, part: Tensor) -> str:
        """Return the rows of `value`, a whole tensor, that `part` is a slice of.

        In a static graph they are an initializer of their own, which begins further on in the same bytes.
        """
        if self.static and value in self._weights:
            return self._view(value, part.first_row, part.shape[0])
        bounds = [self.constant([n], np.int64) for n in (part.first_row, part.first_row + part.shape[0], 0)]
        return self.weight_op("Slice", value, *bounds)

    # Finishing

    def finish(self, doc: str, metadata: dict[str, str]) -> Graph:
        """Return the finished graph; `metadata` goes into the model's metadata_props."""
        nodes = self._weight_nodes + self._nodes
        if self.static:
            nodes = needed(nodes, {info.name for info in self._outputs})
        entries = [entry for weight in self._weights.values() for entry in weight.entries]
        inputs_and_outputs = {info.name for info in (*self._inputs, *self._outputs)}
        # Other runtimes infer shapes in their own words, and refuse others'.
        produced = [name for node in nodes for name in node.output if self.fused and name not in inputs_and_outputs]
        initializers = [*self._constants.values(), *(tensor for entry in entries for tensor in entry.initializers)]
        if self.static:
            read = {name for node in nodes for name in node.input}
            initializers = [tensor for tensor in initializers if tensor.name in read]
        graph = helper.make_graph(
            nodes,
            self.name,
            self._inputs,
            self._outputs,
            initializer=initializers,
            value_info=[helper.make_value_info(name, self._types[name]) for name in produced],
        )
        used_domains = {node.domain for node in nodes}
        model = helper.make_model(
            graph,
            opset_imports=[opset for opset in self._opsets if opset.domain in used_domains],
            ir_version=self._ir_version,
            producer_name="fluxonnx",
            producer_version=metadata.get("version", ""),
            doc_string=doc,
        )
        first = first_rows(self._weights.values())
        helper.set_model_props(model, {**metadata, **({FIRST_ROWS: json.dumps(first)} if first else {})})
        # protobuf copies what it is given: from here on a weight's initializer is the one in the model
        copies = {tensor.name: tensor for tensor in model.graph.initializer}
        for weight in self._weights.values():
            weight.entries = [
                replace(
                    entry,
                    initializer=copies.get(entry.initializer.name, entry.initializer),
                    aliases=[copies.get(alias.name, alias) for alias in entry.aliases],
                    views=[replace(view, initializer=copies.get(view.name, view.initializer)) for view in entry.views],
                )
                for entry in weight.entries
            ]
        weights = list(self._weights.values())
        return Graph(model, weights, self.used, sum(math.prod(weight.source.shape) for weight in weights))
