"""A graph with the changes of LoRA files, derived in memory: the exported files stay as they are.

Beside each product with a changed weight, the graph gets a branch in float32 that computes what the change adds:
up @ (down @ x) for a LoRA, two small products for a LoKr. So integers stay as they are rounded, and no weight is
written anew. A LoHa's matrix is computed from its four small ones in each step: added to a weight of floats, multiplied
beside integers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fluxonnx.lora.adapted import LOCATION, Adapted
from fluxonnx.lora.deltas import Change, Hadamard, Kronecker, LowRank
from fluxonnx.lora.products import Input, Layout, Product, ordered

PREFIX = "lora"


@dataclass(frozen=True)
class Scales:
    """What the rows and columns of a stored weight were multiplied by for rounding: float32 [out] and [in], or None."""

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


@dataclass(frozen=True)
class Active:
    """A change of a layer, and how strongly it is applied."""

    change: Change
    strength: float


def adapt(
    model: onnx.ModelProto, layers: Mapping[str, Sequence[Active]], scales: Mapping[str, Scales], precision: str
) -> Adapted:
    """Derive a graph.

    Args:
        model: An exported graph without its weights; it is changed.
        layers: The changes of each layer, by its path.
        scales: Those of the weights, by their names in the checkpoint.
        precision: The precision of the build, for messages.

    Raises:
        CheckpointError: The graph is not as the exporter wrote it.
    """
    surgery = _Surgery(model, precision)
    for path, active in layers.items():
        for product in surgery.layout.products(path):
            surgery.change(
                product, scales.get(f"{path}.weight", Scales()), [item for item in active if item.strength != 0]
            )
    return surgery.finish()


@dataclass(frozen=True)
class Branch:
    """Where a change of a product is added.

    Attributes:
        place: The nodes behind the product, to which those of the change are added.
        product: The product.
        strength: How strongly the change is applied.
        value: What the change is added to.
        rows: What the outputs of the change are multiplied by, float32 [size]; None for nothing.
        columns: Likewise its inputs, float32 [in].
    """

    place: list[onnx.NodeProto]
    product: Product
    strength: float
    value: str
    rows: np.ndarray | None
    columns: np.ndarray | None


@dataclass
class _Surgery:
    """New nodes and arrays, and where they go."""

    model: onnx.ModelProto
    precision: str
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    # Nodes that only prepare weights come first, as in `GraphBuilder.weight_op`.
    first: list[onnx.NodeProto] = field(default_factory=list)
    after: dict[str, list[onnx.NodeProto]] = field(default_factory=lambda: defaultdict(list))
    shared: dict[tuple, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = Layout(self.model)
        facts = {item.key: item.value for item in self.model.metadata_props}
        self.fused = facts.get("flavour") != "portable"
        # where all values are bfloat16, so are those of the changes
        self.narrow = self.precision == "bf16-native"
        self._count = 0

    # Values

    def op(self, place: list[onnx.NodeProto], type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node behind those in `place`; returns its output."""
        self._count += 1
        name = f"/{PREFIX}/{type}_{self._count}"
        place.append(helper.make_node(type, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: object, dtype: type = np.int64) -> str:
        """Return a small constant."""
        array: np.ndarray = np.asarray(value, ml_dtypes.bfloat16 if dtype is np.float32 and self.narrow else dtype)
        name = f"{PREFIX}/constant/{array.dtype}/{'x'.join(map(str, array.shape))}/{array.tobytes().hex()}"
        self.constants[name] = array
        return name

    def weight(self, array: np.ndarray) -> str:
        """Return an array as a value to compute with; it is stored as it is where the engine has its dtype."""
        known = ("weight", id(array))
        if self.narrow and known not in self.shared:
            name = self.shared[known] = f"{PREFIX}/weight/{len(self.arrays)}"
            self.arrays[name] = np.ascontiguousarray(array.astype(ml_dtypes.bfloat16))
            self._kept.append(array)
        if known not in self.shared:
            name = f"{PREFIX}/weight/{len(self.arrays)}"
            narrow = array.dtype != np.float32
            stored = array if self.fused or not narrow else array.astype(np.float32)
            self.arrays[name] = np.ascontiguousarray(stored)
            cast = narrow and self.fused
            self.shared[known] = self.op(self.first, "Cast", name, to=TensorProto.FLOAT) if cast else name
            self._kept.append(array)
        return self.shared[known]

    _kept: list[np.ndarray] = field(default_factory=list)  # so that no other array gets the same id

    # Changes

    def change(self, product: Product, scales: Scales, active: Sequence[Active]) -> None:
        """Add what changes do to a product."""
        active = [Active(self._of_rows(item.change, product), item.strength) for item in active]
        rows = None if scales.rows is None else scales.rows[product.start : product.start + product.size]
        columns = scales.columns
        if not active:
            return
        place: list[onnx.NodeProto] = []
        base = f"{product.output}/base"
        self._rename(product.output, base)
        if any(item.change.gain is not None and item.change.gain.shape[1] == 1 for item in active):
            product = replace(product, adds_to_weight=False)
        value = self._with_gains(place, product, active, base)
        for item in active:
            value = self._added(place, product, item, value, rows, columns)
        if not place:  # only the weight is another
            self._rename(base, product.output)
            return
        place[-1].output[0] = product.output
        self.after[base] += place

    def _of_rows(self, change: Change, product: Product) -> Change:
        """Return what a change does to the rows of a product."""
        rows = ((product.start, product.start + product.size),)
        gain = change.gain
        if gain is not None and gain.shape[0] > 1:
            gain = gain[product.start : product.start + product.size]
        return Change(change.delta.of_rows(rows), gain)

    def _with_gains(self, place: list[onnx.NodeProto], product: Product, active: Iterable[Active], value: str) -> str:
        """Multiply the output, or the columns of the weight, by 1 + the sum of strength * (gain - 1)."""
        for by_rows in (True, False):
            found = [
                item for item in active if item.change.gain is not None and (item.change.gain.shape[1] == 1) == by_rows
            ]
            if not found:
                continue
            total = np.float32(1) + sum(
                (np.float32(item.strength) * (item.change.gain - 1) for item in found if item.change.gain is not None),
                start=np.float32(0),
            )
            if not by_rows:
                if product.floats:
                    columns = np.ascontiguousarray(total.T if product.flipped else total)
                    self._change_weight(product, "Mul", self.weight(columns))
                else:
                    self._scale_inputs(product, total.reshape(-1))
                continue
            bias = product.node.input[2] if product.node.op_type == "Gemm" and len(product.node.input) > 2 else None
            if bias:
                del product.node.input[2:]
            gains = total.reshape(product.panels, 1, -1) if product.panels > 1 else total.reshape(-1)
            value = self.op(place, "Mul", value, self.weight(np.ascontiguousarray(gains)))
            if bias:
                value = self.op(place, "Add", value, bias)
        return value

    def _change_weight(self, product: Product, type: str, operand: str) -> None:
        """Combine a weight of floats with another matrix before it is multiplied."""
        weight = product.node.input[1]
        product.node.input[1] = self.op(self.first, type, weight, operand)

    def _scale_inputs(self, product: Product, columns: np.ndarray) -> None:
        """Multiply the inputs of a product with a rounded weight, float32 [in], before they are rounded themselves."""
        place, start = self.after[self._last_made(product.inputs)], 0
        scaled: dict[str, str] = {}
        for x in product.inputs:
            width = x.width if len(product.inputs) > 1 else len(columns)
            part = columns[start : start + width].reshape((x.panels, 1, -1) if x.panels > 1 else -1)
            start += width
            scaled[x.value] = self.op(place, "Mul", x.value, self.weight(np.ascontiguousarray(part)))
        place += self.layout.read(product, scaled)

    def _added(
        self,
        place: list[onnx.NodeProto],
        product: Product,
        item: Active,
        value: str,
        rows: np.ndarray | None,
        columns: np.ndarray | None,
    ) -> str:
        """Return `value` and what the delta of a change adds to it."""
        delta, gain = item.change.delta, item.change.gain
        out_gain = None if gain is None or gain.shape[1] != 1 else gain.reshape(-1)
        in_gain = None if gain is None or gain.shape[1] == 1 else gain.reshape(-1)
        to = Branch(place, product, item.strength, value, _both(rows, out_gain), _both(columns, in_gain))
        if isinstance(delta, LowRank):
            return self._low_rank(to, delta)
        if isinstance(delta, Hadamard):
            return self._hadamard(to, delta)
        return self._kronecker(to, delta)

    def _low_rank(self, to: Branch, delta: LowRank) -> str:
        product = to.product
        scale = float(delta.scale * to.strength)
        narrow = self._narrowed(product, delta, to.columns)
        up = _scaled(delta.up, to.rows, 0)
        if product.panels == 1 and self.fused:
            return self.op(to.place, "Gemm", narrow, self.weight(up), to.value, transB=1, alpha=scale)
        narrow = self.op(to.place, "Mul", narrow, self.constant(scale, np.float32))
        up = up.reshape(product.panels, -1, up.shape[1]).transpose(0, 2, 1) if product.panels > 1 else up.T
        wide = self.op(to.place, "MatMul", narrow, self.weight(np.ascontiguousarray(up)))
        return self.op(to.place, "Add", to.value, wide)

    def _narrowed(self, product: Product, delta: LowRank, columns: np.ndarray | None) -> str:
        """Return down @ x, which fused layers and the parts of one share: [rows, rank]."""
        known = ("narrow", id(delta.down), product.inputs, None if columns is None else columns.tobytes())
        if known in self.shared:
            return self.shared[known]
        self._kept.append(delta.down)
        place = self.after[self._last_made(product.inputs)]
        down = _scaled(delta.down, columns, 1)
        parts, start = [], 0
        for x in product.inputs:
            width = x.width if len(product.inputs) > 1 else down.shape[1]
            part = down if width == down.shape[1] else np.ascontiguousarray(down[:, start : start + width])
            start += width
            if x.panels > 1:
                part = np.ascontiguousarray(part.reshape(len(part), x.panels, -1).transpose(1, 2, 0))
                each = self.op(place, "MatMul", x.value, self.weight(part))
                parts.append(self.op(place, "ReduceSum", each, self.constant([0]), keepdims=0))
            elif self.fused:
                parts.append(self.op(place, "Gemm", x.value, self.weight(part), transB=1))
            else:
                parts.append(self.op(place, "MatMul", x.value, self.weight(np.ascontiguousarray(part.T))))
        total = parts[0]
        for part_value in parts[1:]:
            total = self.op(place, "Add", total, part_value)
        self.shared[known] = total
        return total

    def _hadamard(self, to: Branch, delta: Hadamard) -> str:
        place, product, value = to.place, to.product, to.value
        up = _scaled(delta.up.astype(np.float32) * np.float32(delta.scale * to.strength), to.rows, 0)
        matrix = self.op(
            self.first,
            "Mul",
            self.op(self.first, "MatMul", self.weight(up), self.weight(_scaled(delta.down, to.columns, 1))),
            self.op(self.first, "MatMul", self.weight(delta.other_up), self.weight(delta.other_down)),
        )
        if product.adds_to_weight:
            if product.flipped:
                matrix = self.op(self.first, "Transpose", matrix, perm=[1, 0])
            self._change_weight(product, "Add", matrix)
            return value
        x = self._joined(place, product)
        if self.fused:
            wide = self.op(place, "Gemm", x, matrix, transB=1)
        else:
            wide = self.op(place, "MatMul", x, self.op(self.first, "Transpose", matrix, perm=[1, 0]))
        return self.op(place, "Add", value, self._in_panels(place, product, wide))

    def _kronecker(self, to: Branch, delta: Kronecker) -> str:
        place, product, value = to.place, to.product, to.value
        (a, b), (c, d) = delta.left.shape, delta.right.shape
        left = delta.left.astype(np.float32) * np.float32(delta.scale * to.strength)
        x = self._joined(place, product)
        if to.columns is not None:
            x = self.op(place, "Mul", x, self.weight(to.columns))
        x = self.op(place, "Reshape", x, self.constant([-1, b, d]))
        inner = self.op(place, "MatMul", x, self.weight(np.ascontiguousarray(delta.right.T)))
        wide = self.op(place, "Reshape", self.op(place, "MatMul", self.weight(left), inner), self.constant([-1, a * c]))
        pieces = [
            self.op(place, "Slice", wide, self.constant([start]), self.constant([end]), self.constant([1]))
            if (start, end) != (0, a * c)
            else wide
            for start, end in delta.rows
        ]
        wide = pieces[0] if len(pieces) == 1 else self.op(place, "Concat", *pieces, axis=1)
        if to.rows is not None:
            wide = self.op(place, "Mul", wide, self.weight(to.rows))
        if product.panels == 1:
            wide = self.op(place, "Reshape", wide, self.op(place, "Shape", value))
        return self.op(place, "Add", value, self._in_panels(place, product, wide))

    # Layout

    def _joined(self, place: list[onnx.NodeProto], product: Product) -> str:
        """Return the whole input of a product, without panels: [rows, in]."""
        parts = []
        for x in product.inputs:
            value = x.value
            if x.panels > 1:
                value = self.op(place, "Transpose", value, perm=[1, 0, 2])
                value = self.op(place, "Reshape", value, self.constant([-1, x.width]))
            parts.append(value)
        return parts[0] if len(parts) == 1 else self.op(place, "Concat", *parts, axis=-1)

    def _in_panels(self, place: list[onnx.NodeProto], product: Product, value: str) -> str:
        """Lay [rows, size] out as the output of a product is."""
        if product.panels == 1:
            return value
        shape = self.constant([-1, product.panels, product.size // product.panels])
        return self.op(place, "Transpose", self.op(place, "Reshape", value, shape), perm=[1, 0, 2])

    def _last_made(self, inputs: Iterable[Input]) -> str:
        """Return which of some values is made last; "" for inputs of the graph."""
        order = {name: i for i, node in enumerate(self.model.graph.node) for name in node.output}
        return max((x.value for x in inputs), key=lambda value: order.get(value, -1))

    def _rename(self, value: str, name: str) -> None:
        """Rename an output where it is made; its readers get what has its name then."""
        node = self.layout.producer.pop(value)
        node.output[list(node.output).index(value)] = name
        self.layout.producer[name] = node

    def finish(self) -> Adapted:
        """Return the graph with the new nodes in it."""
        graph = self.model.graph
        nodes = [*self.first]
        made = {name for node in graph.node for name in node.output}
        for value, place in self.after.items():
            if value not in made:
                nodes += place
        for node in graph.node:
            nodes.append(node)
            for name in node.output:
                nodes += self.after.get(name, ())
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered(nodes)]
        del graph.node[:]
        graph.node.extend(copies)
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in self.constants.items())
        for name, array in self.arrays.items():
            tensor = TensorProto(name=name, data_type=_onnx_dtype(array), dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, text in (("location", LOCATION), ("offset", 0), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(text))
            graph.initializer.append(tensor)
        return Adapted(self.model, self.arrays)


def _both(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second


def _scaled(array: np.ndarray, factors: np.ndarray | None, axis: int) -> np.ndarray:
    """Multiply rows (axis 0) or columns; powers of two leave the dtype, other factors make it float32."""
    if factors is None:
        return array
    product = array.astype(np.float32) * (factors[:, None] if axis == 0 else factors)
    return product.astype(array.dtype) if (np.frexp(factors)[0] == 0.5).all() else product


def _onnx_dtype(array: np.ndarray) -> int:
    if array.dtype == ml_dtypes.bfloat16:
        return int(TensorProto.BFLOAT16)
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))
