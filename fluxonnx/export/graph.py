"""A thin graph builder over `onnx.helper`: names, scopes, shared constants, weights and shapes.

A value is its name, a plain string. Types are inferred as nodes are added, so that a mistake shows at the line that
made it and every value of the finished graph has a type.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, shape_inference

from fluxonnx.checkpoint import DTYPES, Tensor
from fluxonnx.errors import CheckpointError

if TYPE_CHECKING:
    from fluxonnx.export.precision import Precision

MICROSOFT = "com.microsoft"

# Weights are named by these safetensors dtypes, initializers by these ONNX ones.
ONNX_DTYPES = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "F64": TensorProto.DOUBLE,
    "I64": TensorProto.INT64,
    "I8": TensorProto.INT8,
    "U8": TensorProto.UINT8,
}

# What a weight can be without more being known about it.
FLOATS = ("BF16", "F16", "F32", "F64")

Dim = int | str | None
T = TypeVar("T")


@dataclass
class Target:
    """What a graph is built for: the operators it may use and how it stores its weights."""

    precision: Precision
    flavour: str  # "ort": also com.microsoft operators; "portable": only ai.onnx ones
    opset: int

    @property
    def fused(self) -> bool:
        """Whether onnxruntime's own operators may be used."""
        return self.flavour == "ort"


@dataclass(frozen=True)
class Part:
    """One of the arrays that a tensor is encoded as: in the file, and in the graph where that differs."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    graph_dtype: int | None = None
    graph_shape: tuple[int, ...] | None = None

    @property
    def onnx_dtype(self) -> int:
        """Its type in the graph."""
        return self.graph_dtype or ONNX_DTYPES[self.dtype]

    @property
    def onnx_shape(self) -> tuple[int, ...]:
        """Its shape in the graph."""
        return self.graph_shape or self.shape


@dataclass
class Entry:
    """An initializer whose bytes live outside the graph, and the safetensors entry they are.

    The two differ in shape and type only where safetensors lacks the type (two int4 values are a byte there).
    `aliases` are further initializers that are the same bytes.
    """

    initializer: TensorProto
    dtype: str
    shape: tuple[int, ...]
    aliases: list[TensorProto] = field(default_factory=list)

    @property
    def initializers(self) -> list[TensorProto]:
        """The initializer and its aliases."""
        return [self.initializer, *self.aliases]

    @property
    def nbytes(self) -> int:
        """How many bytes are stored."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass
class StoredWeight:
    """What is stored of a tensor of the checkpoint.

    Attributes:
        source: The tensor.
        entries: Itself, maybe of another dtype, or what it is encoded as (integers, their scales).
        encode: Returns an array per entry; None if the tensor is at most cast.
        in_place: Whether the bytes stay where they are.
    """

    source: Tensor
    entries: list[Entry]
    encode: Callable[[Tensor], Sequence[np.ndarray]] | None
    in_place: bool


@dataclass
class Graph:
    """A finished graph: the model without its weights, and where each weight comes from."""

    model: onnx.ModelProto
    weights: list[StoredWeight]
    used: set[str]
    parameters: int


@dataclass
class GraphBuilder:
    """Builds one graph from a table of checkpoint tensors."""

    name: str
    target: Target
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.used: set[str] = set()
        self._opsets = [helper.make_opsetid("", self.target.opset), helper.make_opsetid(MICROSOFT, 1)]
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
        """Leave all modules, for what belongs to none."""
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

    def input(self, name: str, dtype: int, shape: Sequence[Dim], doc: str) -> str:
        """Declare an input of the graph."""
        info = helper.make_tensor_value_info(name, dtype, list(shape), doc)
        self._inputs.append(info)
        self._types[name] = info.type
        return name

    def output(self, name: str, value: str, shape: Sequence[Dim], doc: str) -> None:
        """Declare `value` an output of the graph, called `name`."""
        dtype = self.dtype(value)
        with self.outside():
            self.op("Identity", value, output=name)
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape), doc))

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Return a constant, shared by everyone who asks for the same numbers."""
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
            like: A value whose type the output has; needed for operators outside ai.onnx, which onnx can't infer.
            domain: The operator's domain.
            output: A name for the output instead of the node's own.
            outputs: How many outputs it has.
            **attributes: The operator's attributes.

        Returns:
            The output's name, or a list of them when there are several.
        """
        name = self._unique(op_type)
        names = [output or name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        node = helper.make_node(op_type, list(inputs), names, name=name, domain=domain, **attributes)
        inferred = dict.fromkeys(names, self._types[like]) if like is not None else self._infer(node)
        for value in names:
            self._types[value] = inferred[value]
            if shape is not None:
                dtype = inferred[value].tensor_type.elem_type
                self._types[value] = helper.make_tensor_type_proto(dtype, list(shape))
        self._nodes.append(node)
        return names[0] if outputs == 1 else names

    def _infer(self, node: onnx.NodeProto) -> dict[str, onnx.TypeProto]:
        schema = onnx.defs.get_schema(node.op_type, self.target.opset, node.domain)
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
        """Return the size of a value's last dimension, which is known of whatever goes into a linear."""
        return self.sizes(value, 1)[0]

    def sizes(self, value: str, count: int) -> list[int]:
        """Return the sizes of a value's last dimensions, which are known of heads, too."""
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
        """Apply ReduceMax or ReduceMean and keep the axes, which were an attribute before opset 18."""
        if self.target.opset >= 18:
            return self.op(op_type, value, self.constant(axes, np.int64), keepdims=1)
        return self.op(op_type, value, axes=list(axes), keepdims=1)

    # Weights

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """Take a parameter of the module in scope out of the checkpoint.

        Raises:
            CheckpointError: It is missing or has another shape; the message has its name and both shapes.
        """
        path = self.path(name)
        tensor = self.tensors.get(path)
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
        if tensor.dtype not in FLOATS and not tensor.quantisation:
            raise CheckpointError(f"{self.name}: tensor {path} is {tensor.dtype}, expected BF16, F16 or F32")
        if tensor.quantisation and not self.target.precision.takes_integers:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is quantised to 8-bit integers: export it with --precision int8"
            )
        self.used.add(path)
        return tensor

    def stored(self, tensor: Tensor, dtype: str) -> str:
        """Return an initializer of `dtype` for `tensor`, its bytes outside the graph."""
        if tensor.name not in self._weights:
            entry = self._entry(tensor.name, dtype, tensor.shape, ONNX_DTYPES[dtype], tensor.shape)
            in_place = dtype == tensor.dtype and not tensor.swapped and not self.target.precision.self_contained
            self._weights[tensor.name] = StoredWeight(tensor, [entry], None, in_place)
        return tensor.name

    def encoded(self, tensor: Tensor, parts: Sequence[Part], encode: Callable[[Tensor], Sequence[np.ndarray]]) -> None:
        """Store what `encode` makes of `tensor`: an array per part, under the tensor's name and the part's suffix."""
        if tensor.name not in self._weights:
            entries = [
                self._entry(tensor.name + part.suffix, part.dtype, part.shape, part.onnx_dtype, part.onnx_shape)
                for part in parts
            ]
            self._weights[tensor.name] = StoredWeight(tensor, entries, encode, in_place=False)

    def aliases(self, name: str, count: int) -> list[str]:
        """Return `count` more names for what is stored as `name`.

        onnxruntime refuses a graph in which two products share weights that it has to make unsigned.
        """
        (entry,) = (e for weight in self._weights.values() for e in weight.entries if e.initializer.name == name)
        made = [f"{name}.alias{i}" for i in range(count)]
        for alias in made:
            entry.aliases.append(TensorProto())
            entry.aliases[-1].CopyFrom(entry.initializer)
            entry.aliases[-1].name = alias
            self._types[alias] = self._types[name]
        return made

    def _entry(
        self, name: str, dtype: str, shape: tuple[int, ...], onnx_dtype: int, onnx_shape: tuple[int, ...]
    ) -> Entry:
        self._types[name] = helper.make_tensor_type_proto(onnx_dtype, onnx_shape)
        return Entry(TensorProto(name=name, data_type=onnx_dtype, dims=onnx_shape), dtype, shape)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returned for this key the first time: for values that several layers share."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def weight_op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node that only prepares a weight.

        These nodes come first in the graph: onnxruntime visits inputs by falling node index, so a cast that precedes
        everything runs right before its consumer, while one placed beside its consumer is hoisted before the whole
        chain and all weights are live at once (measured: 1 GB against 18 GB on the 4B transformer).
        """
        value = self.op(op_type, *inputs, **attributes)
        self._weight_nodes.append(self._nodes.pop())
        return value

    def weight_rows(self, value: str, part: Tensor) -> str:
        """Return the rows that `part` is of the tensor that `value` is."""
        bounds = [self.constant([n], np.int64) for n in (part.first_row, part.first_row + part.shape[0], 0)]
        return self.weight_op("Slice", value, *bounds)

    def weight(self, name: str, *shape: int) -> str:
        """Return a parameter of the module in scope as float32."""
        return self.target.precision.weight(self, self.tensor(name, shape))

    # The end

    def finish(self, doc: str, metadata: dict[str, str]) -> Graph:
        """Return the finished graph; `metadata` goes into the model's metadata_props."""
        nodes = self._weight_nodes + self._nodes
        entries = [entry for weight in self._weights.values() for entry in weight.entries]
        inputs_and_outputs = {info.name for info in (*self._inputs, *self._outputs)}
        produced = [name for node in nodes for name in node.output if name not in inputs_and_outputs]
        graph = helper.make_graph(
            nodes,
            self.name,
            self._inputs,
            self._outputs,
            initializer=[*self._constants.values(), *(tensor for entry in entries for tensor in entry.initializers)],
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
        helper.set_model_props(model, metadata)
        # protobuf copies what it is given: from here on a weight's initializer is the one in the model
        copies = {tensor.name: tensor for tensor in model.graph.initializer}
        for weight in self._weights.values():
            weight.entries = [
                replace(
                    entry,
                    initializer=copies[entry.initializer.name],
                    aliases=[copies[alias.name] for alias in entry.aliases],
                )
                for entry in weight.entries
            ]
        weights = list(self._weights.values())
        return Graph(model, weights, self.used, sum(math.prod(weight.source.shape) for weight in weights))
