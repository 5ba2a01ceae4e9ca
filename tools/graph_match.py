"""Read ONNX graphs without names, and match the nodes of two of them; see graph_diff.py.

A value is identified by what computes it: operator, domain, attributes, inputs and the index of the output. A weight is
the place that it points to; a small inline constant is its value. Names never make a difference. Where the structure
leaves several candidates, they decide which node is compared with which.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

SMALL = 16  # inline tensors of up to this many elements belong to the node that reads them, as attributes do
MAX_COMPARISONS = 250_000  # above it, nodes that could be pairs are not compared each with each

Keys = Sequence[Sequence[Hashable]]  # of the nodes of both graphs


class Weight(NamedTuple):
    """What an initializer is: the place of external data; of inline data the value or a hash."""

    dtype: str
    shape: tuple[int, ...]
    place: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    @property
    def is_small(self) -> bool:
        """Tell if `place` is the value itself."""
        return self.place.startswith("= ")

    @property
    def file(self) -> str:
        """The file that holds the data."""
        return self.place.rpartition("@")[0] or "inline"


class Value(NamedTuple):
    """What a node reads. The key is the index of a node, the name of an input, a Weight or the text of a constant."""

    kind: str  # node, input, weight, constant or absent
    key: Any = None
    slot: int = 0  # which output of the node


@dataclass(frozen=True)
class Node:
    """A node; names are kept for printing and to settle ties."""

    op: str
    detail: str  # attributes and constants
    label: Hashable
    inputs: list[Value]
    input_names: list[str]
    outputs: list[str]
    name: str

    @property
    def scope(self) -> str:
        """The module path: `transformer_blocks.3/attn` of `/transformer_blocks.3/attn/Mul_1`."""
        return self.name.strip("/").rpartition("/")[0]


@dataclass(frozen=True)
class Graph:
    """A graph whose values are resolved."""

    model: ModelProto
    nodes: list[Node]
    users: list[list[tuple[int, int, int]]]  # for each node: output, position of the input that reads it, reader
    inputs: dict[str, str]
    outputs: dict[str, str]
    results: dict[str, Value]  # what the outputs are
    types: dict[str, str]
    weights: dict[str, Weight]


def weight(tensor: TensorProto) -> Weight:
    """Return what a tensor is; external data is not read."""
    dtype, shape = TensorProto.DataType.Name(tensor.data_type).lower(), tuple(tensor.dims)
    if tensor.data_location == TensorProto.EXTERNAL:
        entry = {item.key: item.value for item in tensor.external_data}
        place = f"{entry.get('location', '')}@{entry.get('offset', '0')}+{entry.get('length', '?')}"
        return Weight(dtype, shape, place)
    array = numpy_helper.to_array(tensor)
    if array.size <= SMALL:
        return Weight(dtype, shape, f"= {array.tolist() if array.size else list(shape)}")
    data = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
    return Weight(dtype, shape, hashlib.sha256(data).hexdigest())


def attribute_text(attribute: AttributeProto) -> str:
    """Return `name=value`."""
    if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        raise ValueError("graphs inside nodes (If, Loop, Scan) cannot be compared")
    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        found = weight(value)
        value = f"{found} {found.place}"
    elif isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    return f"{attribute.name}={value}"


def type_text(info: ValueInfoProto) -> str:
    """Return a type such as `float[batch, 128]`."""
    tensor = info.type.tensor_type
    dims = [dim.dim_param or (str(dim.dim_value) if dim.HasField("dim_value") else "?") for dim in tensor.shape.dim]
    shape = ", ".join(dims) if tensor.HasField("shape") else "..."
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()}[{shape}]"


def read_graph(path: Path) -> Graph:
    """Read a graph without its external data.

    Raises:
        ValueError: The file is not an ONNX model, or its nodes are not in topological order.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path}: not an ONNX model") from error
    if not model.ir_version or not model.graph.output:
        raise ValueError(f"{path}: not an ONNX model")
    try:
        return resolve(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def resolve(model: ModelProto) -> Graph:
    """Return a model's graph with all values resolved."""
    graph = model.graph
    weights = {tensor.name: weight(tensor) for tensor in graph.initializer}
    inputs = {info.name: type_text(info) for info in graph.input if info.name not in weights}
    values = {"": Value("absent"), **{name: Value("input", name) for name in inputs}}
    for name, found in weights.items():
        constant = Value("constant", f"{found.dtype} {found.place.removeprefix('= ')}")
        values[name] = constant if found.is_small else Value("weight", found)
    nodes: list[Node] = []
    users: list[list[tuple[int, int, int]]] = [[] for _ in graph.node]
    for index, proto in enumerate(graph.node):
        names = list(proto.input)
        while names and not names[-1]:
            names.pop()
        if not values.keys() >= set(names):
            raise ValueError(f"node {index} ({proto.op_type}) reads a value that no node before it computes")
        read = [values[name] for name in names]
        op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}:{proto.op_type}"
        attributes = sorted(attribute_text(attribute) for attribute in proto.attribute)
        fixed = tuple(value.key or "" if value.kind in ("constant", "absent") else None for value in read)
        constants = [f"#{position}: {text}" for position, text in enumerate(fixed) if text]
        label = (op, *attributes, fixed, len(proto.output))
        nodes.append(Node(op, ", ".join([*attributes, *constants]), label, read, names, list(proto.output), proto.name))
        for position, value in enumerate(read):
            if value.kind == "node":
                users[value.key].append((value.slot, position, index))
        values |= {name: Value("node", index, slot) for slot, name in enumerate(proto.output) if name}
    types = {info.name: type_text(info) for info in (*graph.value_info, *graph.input, *graph.output)}
    types |= {name: str(found) for name, found in weights.items()}
    outputs = {info.name: type_text(info) for info in graph.output}
    if not values.keys() >= outputs.keys():
        raise ValueError("no node computes an output of the graph")
    return Graph(model, nodes, users, inputs, outputs, {name: values[name] for name in outputs}, types, weights)


def former_names(old: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """Return the old name of each new input or output: the same, or that of the next one of its type that is gone."""
    names = {name: name for name in new if name in old}
    gone = [name for name in old if name not in new]
    for name in new:
        match = next((other for other in gone if old[other] == new[name]), None)
        if name not in names and match:
            names[name] = match
            gone.remove(match)
    return names


class Matching:
    """Which node of the old graph is which node of the new graph.

    Hashes over everything before a node, everything after it, and its own weights make the first pairs. Pairs spread
    to their neighbours: to producers first, because an input has only one. What is left is paired by its neighbourhood,
    then by its order within a scope.

    Args:
        old: The old graph.
        new: The new graph.
        weights_by: What identifies a weight. "place": where its data is, or its name if only one graph has the place;
            "name": its name, or the place if only one graph has the name; "shape": only its type and shape.
    """

    def __init__(self, old: Graph, new: Graph, weights_by: str = "place") -> None:
        self.old, self.new = old, new
        self.forth: dict[int, int] = {}
        self.back: dict[int, int] = {}
        self.inputs = former_names(old.inputs, new.inputs)
        self.outputs = former_names(old.outputs, new.outputs)
        self._ids: dict[Hashable, int] = {}
        self._weights_by = weights_by
        self._names = old.weights.keys() & new.weights.keys()
        self._places = {*old.weights.values()} & {*new.weights.values()}
        self._ends = {(x.key, y.key) for _, x, y in self.results() if x.kind == y.kind == "node" and x.slot == y.slot}
        self._match()

    def free(self) -> tuple[list[int], list[int]]:
        """Return the nodes of each graph that have no counterpart."""
        sides = ((self.old, self.forth), (self.new, self.back))
        old, new = ([index for index in range(len(graph.nodes)) if index not in pairs] for graph, pairs in sides)
        return old, new

    def results(self) -> Iterator[tuple[str, Value, Value]]:
        """Yield the outputs of both graphs: the new name, what it was and what it is."""
        for name, former in self.outputs.items():
            yield name, self.old.results[former], self.new.results[name]

    def same(self, x: Value, y: Value) -> bool:
        """Tell if two values correspond; any two weights do, because changes of weights are reported on their own."""
        if x.kind != y.kind or x.kind == "weight":
            return x.kind == y.kind
        if x.kind == "node":
            return x.slot == y.slot and self.forth.get(x.key) == y.key
        return x.key == (self.inputs.get(y.key) if x.kind == "input" else y.key)

    def _id(self, *key: Hashable) -> int:
        return self._ids.setdefault(key, len(self._ids))

    def _token(self, value: Value, name: str) -> Hashable:
        """Return what identifies, in both graphs, a value that no node computes."""
        if value.kind == "weight":
            if self._weights_by == "shape":
                return str(value.key)
            is_known = name in self._names and (self._weights_by == "name" or value.key not in self._places)
            return name if is_known else value.key
        return name if value.kind == "input" else value.key

    def _hashes(self, graph: Graph, inputs: dict[str, str], outputs: dict[str, str]) -> tuple[list[int], ...]:
        """Return hashes of each node: with all before it, with all after it, and with its weights.

        Nodes that depend on weights alone, such as casts, count as weights of the nodes that read them.
        """
        forward: list[int] = []
        local: list[int] = []
        is_static: list[bool] = []
        for node in graph.nodes:
            tokens, static = [], []
            for value, name in zip(node.inputs, node.input_names, strict=True):
                if value.kind == "node":
                    tokens.append(self._id(forward[value.key], value.slot))
                    static.append(is_static[value.key])
                else:
                    tokens.append(self._id(value.kind, self._token(value, inputs.get(name, name))))
                    static.append(value.kind != "input")
            is_static.append(all(static))
            forward.append(self._id("forward", node.label, *tokens))
            fixed = [token if known else None for token, known in zip(tokens, static, strict=True)]
            local.append(self._id("local", node.label, *fixed))
        results: dict[int, list[str]] = defaultdict(list)
        for name, value in graph.results.items():
            results[value.key if value.kind == "node" else -1].append(f"{value.slot} {outputs.get(name, name)}")
        backward = [0] * len(graph.nodes)
        for index in reversed(range(len(graph.nodes))):
            after = sorted((slot, position, backward[user]) for slot, position, user in graph.users[index])
            backward[index] = self._id("backward", local[index], *after, *sorted(results[index]))
        return forward, backward, local

    def _match(self) -> None:
        old, new = self._hashes(self.old, {}, {}), self._hashes(self.new, self.inputs, self.outputs)
        forward, backward, local = zip(old, new, strict=True)
        labels = [[self._id(node.label) for node in graph.nodes] for graph in (self.old, self.new)]
        scopes = [[node.scope for node in graph.nodes] for graph in (self.old, self.new)]
        for hashes in (forward, backward, local):
            self._join(hashes, unique=True)
        keys: Sequence[Sequence[int]]
        for keys in (local, labels):
            self._spread(keys)
            self._join(self._rings(keys))
            self._spread(keys)
        for within in (scopes, [[""] * len(side) for side in scopes]):
            self._align(labels, within)
            self._spread(labels)
        # A pair without any common neighbour is two nodes that look the same by chance.
        for a, b in list(self.forth.items()):
            loose = any(value.kind not in ("constant", "absent") for value in self.old.nodes[a].inputs)
            if (loose or self.old.users[a]) and not self._support(a, b):
                del self.forth[a], self.back[b]

    def _add(self, a: int, b: int) -> None:
        self.forth[a], self.back[b] = b, a

    def _grouped(self, keys: Keys) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the free nodes of both graphs that share a key, in the order of the old graph."""
        sides: list[dict[Hashable, list[int]]] = [defaultdict(list), defaultdict(list)]
        for side, free, key in zip(sides, self.free(), keys, strict=True):
            for index in free:
                side[key[index]].append(index)
        yield from ((mine, sides[1][key]) for key, mine in sides[0].items() if key in sides[1])

    def _join(self, keys: Keys, unique: bool = False) -> None:
        """Pair nodes with the same key where both graphs have the same number of them."""
        for mine, theirs in self._grouped(keys):
            if len(mine) != len(theirs) or (unique and len(mine) > 1):
                continue
            few = 1 < len(mine) ** 2 <= MAX_COMPARISONS
            for a in mine:
                b = max(theirs, key=partial(self._likeness, a)) if few else theirs[0]
                theirs.remove(b)
                self._add(a, b)

    def _likeness(self, a: int, b: int) -> tuple[int, bool]:
        return self._support(a, b), self.old.nodes[a].name == self.new.nodes[b].name

    def _support(self, a: int, b: int) -> int:
        """Return how many neighbours of two nodes correspond."""
        mine, theirs = self.old.nodes[a], self.new.nodes[b]
        count = int((a, b) in self._ends)
        for x, y, name, other in zip(mine.inputs, theirs.inputs, mine.input_names, theirs.input_names, strict=True):
            if x.kind == y.kind == "weight":
                count += self._token(x, name) == self._token(y, other)
            elif x.kind in ("node", "input"):
                count += self.same(x, y)
        users = set(self.new.users[b])
        return count + sum((*use[:2], self.forth.get(use[2])) in users for use in self.old.users[a])

    def _spread(self, keys: Keys) -> None:
        """Pair those neighbours of pairs that have the same key."""
        upward = list(self.forth.items())
        downward = upward[::-1]
        while upward or downward:
            near = self._producers(*upward.pop()) if upward else self._users(*downward.pop(), keys)
            for a, b in list(near):
                if a not in self.forth and b not in self.back and keys[0][a] == keys[1][b]:
                    self._add(a, b)
                    upward.append((a, b))
                    downward.append((a, b))

    def _producers(self, a: int, b: int) -> Iterator[tuple[int, int]]:
        for x, y in zip(self.old.nodes[a].inputs, self.new.nodes[b].inputs, strict=True):
            if x.kind == y.kind == "node" and x.slot == y.slot:
                yield x.key, y.key

    def _users(self, a: int, b: int, keys: Keys) -> Iterator[tuple[int, int]]:
        """Yield readers that are the only free ones of their kind."""
        sides: list[dict[Hashable, list[int]]] = [defaultdict(list), defaultdict(list)]
        uses = ((self.old.users[a], self.forth), (self.new.users[b], self.back))
        for side, (users, pairs), key in zip(sides, uses, keys, strict=True):
            for slot, position, user in users:
                if user not in pairs:
                    side[slot, position, key[user]].append(user)
        for found, mine in sides[0].items():
            if len(mine) == len(sides[1].get(found, ())) == 1:
                yield mine[0], sides[1][found][0]

    def _rings(self, keys: Sequence[Sequence[int]]) -> Keys:
        """Return keys that include the direct neighbours of each node."""
        pairs = [{a: self._id("pair", a) for a in self.forth}, {b: self._id("pair", a) for b, a in self.back.items()}]
        rings: list[list[int]] = [[], []]
        for ring, graph, key, pair in zip(rings, (self.old, self.new), keys, pairs, strict=True):
            ids = [pair.get(index, found) for index, found in enumerate(key)]
            for node, users in zip(graph.nodes, graph.users, strict=True):
                before = [(kind, slot, ids[key] if kind == "node" else 0) for kind, key, slot in node.inputs]
                after = sorted((slot, position, ids[user]) for slot, position, user in users)
                ring.append(self._id("ring", ids[len(ring)], *before, *after))
        return rings

    def _align(self, labels: Keys, scopes: Keys) -> None:
        """Pair free nodes of the same scope by their order."""
        for mine, theirs in self._grouped(scopes):
            if len(mine) * len(theirs) <= MAX_COMPARISONS:
                before, after = [labels[0][a] for a in mine], [labels[1][b] for b in theirs]
                for first, second, size in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
                    for step in range(size):
                        self._add(mine[first + step], theirs[second + step])
