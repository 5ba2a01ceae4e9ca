"""What one ONNX file holds, of any maker: its contract, its operators, its parameters and where they lie."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

from fluxonnx.check.external import ExternalFile, external_files, needed_bytes
from fluxonnx.check.shapes import MOST_DIMENSIONS
from fluxonnx.check.work import SCALE_FACTOR, Work, count, symbols
from fluxonnx.checkpoint.reading import foreign, open_regular, parse_json, shown
from fluxonnx.errors import CheckpointError
from fluxonnx.measure.tables import table

# The largest message of protobuf.
MOST_BYTES = 2**31 - 1
# An architecture in the metadata is long, and the config files say the same.
LONGEST_VALUE = 60


@dataclass(frozen=True)
class Value:
    """An input or an output: its type ("float32", ...) and its shape, symbolic dimensions by name."""

    name: str
    type: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True)
class Stored:
    """The tensors of one type: how many, their values, and the bytes that they take in files."""

    type: str
    tensors: int
    values: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        file: Its name.
        bytes: Its size, without external data.
        ir_version: The version of ONNX's format.
        opsets: Versions of operators by domain; "ai.onnx" is ONNX's own.
        producer: Which program wrote it.
        metadata: What it says about itself.
        inputs: Its inputs, without tensors that are listed as inputs, too.
        outputs: Its outputs.
        operators: Nodes by type, those of loops, branches and functions included; the most first.
        parameters: Its tensors by type; those of 4-bit weights that are stored as bytes count as "4-bit".
        external: The files that tensors lie in.
        work: The multiply-adds of a run.
        problems: What is wrong with it; nothing if it is intact.
    """

    file: str
    bytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    metadata: dict[str, str]
    inputs: list[Value]
    outputs: list[Value]
    operators: dict[str, int]
    parameters: list[Stored]
    external: list[ExternalFile]
    work: Work
    problems: list[str]


def inspect(
    path: Path, width: int = 512, height: int = 512, text_seq: int = 512, dims: Mapping[str, int] | None = None
) -> Inspection:
    """Look at an ONNX file; tensors that lie in other files are not loaded.

    Args:
        path: The file.
        width: Pixels of the picture that work is counted for.
        height: Pixels of the picture that work is counted for.
        text_seq: Tokens of its prompt.
        dims: Numbers for symbolic dimensions, which take precedence.

    Raises:
        CheckpointError: It can't be read, or is no ONNX file.
    """
    model = read(path)
    metadata = {item.key: item.value for item in model.metadata_props}
    known = symbols(width, height, text_seq, _scale_factor(metadata)) | dict(dims or {})
    tensors, problems = [], []
    for tensor in _tensors(model.graph):
        if len(tensor.dims) > MOST_DIMENSIONS or any(size < 0 for size in tensor.dims):
            problems.append(f"tensor {shown(tensor.name)} has a shape that can't be: {shown(list(tensor.dims))}")
        else:
            tensors.append(tensor)
    external, others = external_files(path, tensors)
    problems += others
    problems += [file.problem for file in external if file.problem]
    problems += list(_dangling(model.graph, set()))
    constants = {item.name for item in model.graph.initializer}
    return Inspection(
        file=str(path),
        bytes=path.stat().st_size,
        ir_version=model.ir_version,
        opsets={item.domain or "ai.onnx": item.version for item in model.opset_import},
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        metadata=metadata,
        inputs=[_value(item) for item in model.graph.input if item.name not in constants],
        outputs=[_value(item) for item in model.graph.output],
        operators=dict(Counter(map(_operator, _nodes(model))).most_common()),
        parameters=_stored(tensors, _four_bits(model.graph)),
        external=external,
        work=count(model, known),
        problems=problems,
    )


def read(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its external data.

    Raises:
        CheckpointError: It can't be read, or is no ONNX file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_BYTES:
                raise CheckpointError(f"{path} has {size} bytes, but an ONNX file has at most 2 GB: it is damaged")
            content = file.read()
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder: name one of its .onnx files") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    if what := foreign(content[:64]):
        raise CheckpointError(f"{path} {what}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # protobuf's errors have no base that it exports
        raise CheckpointError(f"{path} is no ONNX file, or a damaged one: export or download it again") from None
    if not model.HasField("graph") or not model.ir_version:
        raise CheckpointError(f"{path} is no ONNX file, or a damaged one: export or download it again")
    if not _is_text(model):
        raise CheckpointError(
            f"{path} is a damaged ONNX file, with names that are no text: export or download it again"
        )
    return model


def _is_text(model: onnx.ModelProto) -> bool:
    """Whether all texts in a message are; protobuf returns what is not UTF-8 as bytes."""
    pending: list[Any] = [model]
    while pending:
        for field, value in pending.pop().ListFields():
            values = [value] if isinstance(value, str | bytes | int | float) or hasattr(value, "ListFields") else value
            if field.type == field.TYPE_MESSAGE:
                pending += values
            elif field.type == field.TYPE_STRING and any(isinstance(text, bytes) for text in values):
                return False
    return True


def _scale_factor(metadata: Mapping[str, str]) -> int:
    """Return the pixels along each side of a latent token that a VAE graph of ours tells of."""
    try:
        channels = parse_json(metadata.get("architecture", "{}"))["encoder_channels"]
        return 2 ** min(max(len(channels), 1), 8)
    except (ValueError, KeyError, TypeError):
        return SCALE_FACTOR


def _value(item: onnx.ValueInfoProto) -> Value:
    kind = item.type.WhichOneof("value")
    if kind != "tensor_type":
        return Value(item.name, (kind or "unknown").removesuffix("_type"), None)
    found = item.type.tensor_type
    shape = tuple(dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in found.shape.dim)
    return Value(item.name, type_name(found.elem_type), shape if found.HasField("shape") else None)


def type_name(data_type: int) -> str:
    """Name a type of ONNX as numpy does: "float32", "bfloat16", "int64", ..."""
    try:
        name = TensorProto.DataType.Name(data_type).lower()
    except ValueError:
        return f"type {data_type}"
    return {"float": "float32", "double": "float64"}.get(name, name)


def _operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    pending = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while pending:
        node = pending.pop()
        yield node
        for graph in _graphs(node):
            pending += graph.node


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield initializers and constants, those of loops and branches, too."""
    pending = [graph]
    while pending:
        found = pending.pop()
        yield from found.initializer
        for sparse in found.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in found.node:
            yield from (item.t for item in node.attribute if item.type == AttributeProto.TENSOR)
            pending += _graphs(node)


def _four_bits(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the weights that MatMulNBits finds packed in bytes, and how many values they are."""
    found = {}
    for node in graph.node:
        values = {item.name: item.i for item in node.attribute}
        if node.op_type == "MatMulNBits" and len(node.input) > 1 and values.get("bits", 4) == 4:
            found[node.input[1]] = values.get("N", 0) * values.get("K", 0)
    return found


def _stored(tensors: list[onnx.TensorProto], packed: Mapping[str, int]) -> list[Stored]:
    kinds: dict[str, list[tuple[int, int]]] = {}
    for tensor in tensors:
        kind, values = type_name(tensor.data_type), math.prod(tensor.dims)
        if tensor.name in packed:
            kind, values = "4-bit", packed[tensor.name]
        kinds.setdefault(kind, []).append((values, needed_bytes(tensor) or tensor.ByteSize()))
    rows = [Stored(kind, len(sizes), *map(sum, zip(*sizes, strict=True))) for kind, sizes in kinds.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def _dangling(graph: onnx.GraphProto, outer: set[str]) -> Iterator[str]:
    """Yield what is wrong with the edges of a graph: the first value that nothing makes, an output that is none."""
    made = outer | {item.name for item in (*graph.input, *graph.initializer)} | {""}
    made |= {item.values.name for item in graph.sparse_initializer}
    for node in graph.node:
        if missing := next((name for name in node.input if name not in made), None):
            where = shown(node.name or node.output[0] if node.output else node.op_type)
            yield f"node {where} ({node.op_type}) takes {shown(missing)}, which nothing makes before it: it was edited"
            return
        for inner in _graphs(node):
            yield from _dangling(inner, made)
        made.update(node.output)
    if missing := next((item.name for item in graph.output if item.name not in made), None):
        yield f"the output {shown(missing)} is made by no node: it was edited"


def to_text(found: Inspection) -> str:
    """Write an inspection as JSON."""
    values: dict[str, Any] = asdict(found)
    values["work"]["total"] = found.work.total
    values["intact"] = not found.problems
    return json.dumps(values, indent=2)


def report(found: Inspection) -> str:
    """Write an inspection for a person."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    lines = [f"{found.file}: {found.bytes:,} bytes, ONNX format {found.ir_version}, opset {opsets}"]
    if found.producer:
        lines.append(f"written by {found.producer}")
    lines += [f"{key}: {_short(value)}" for key, value in found.metadata.items() if key not in ("producer", "version")]
    for title, values in (("input", found.inputs), ("output", found.outputs)):
        rows = [[item.name, item.type, _shape(item.shape)] for item in values]
        lines += ["", table([title, "type", "shape"], rows)]
    lines += ["", table(["operator", "nodes"], [[name, f"{n:,}"] for name, n in found.operators.items()])]
    rows = [[row.type, f"{row.tensors:,}", f"{row.values:,}", f"{row.bytes:,}"] for row in found.parameters]
    lines += ["", table(["parameters", "tensors", "values", "bytes"], rows)]
    if found.external:
        rows = [
            [
                f.location,
                f"{f.tensors:,}",
                f"{f.bytes:,}",
                "" if f.file_bytes is None else f"{f.file_bytes:,}",
                _state(f),
            ]
            for f in found.external
        ]
        lines += ["", table(["external data", "tensors", "bytes", "file", "state"], rows)]
    else:
        lines += ["", "external data: none"]
    return "\n".join([*lines, "", *_work(found.work)])


def _state(file: ExternalFile) -> str:
    if file.problem:
        return "damaged" if file.file_bytes is not None else "missing"
    return "intact, as exported" if file.digest else "complete; no digest is known"


def _work(work: Work) -> Iterator[str]:
    dims = ", ".join(f"{name} {number}" for name, number in work.dims.items())
    if work.free:
        yield f"work: not known whole, as {', '.join(map(shown, work.free))} has no number: give it with --dim NAME=N"
    yield f"work: {work.total:,} multiply-adds" + (f" for {dims}" if dims else "")
    if work.by_operator:
        shares = [[name, f"{n:,}", f"{100 * n / max(work.total, 1):.1f} %"] for name, n in work.by_operator.items()]
        yield table(["operator", "multiply-adds", "share"], shares)
    if work.unknown:
        yield "not counted: " + ", ".join(f"{n} {name}" for name, n in work.unknown.items())


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_VALUE else f"{line[:LONGEST_VALUE]}... ({len(line)} characters)"


def _shape(shape: tuple[int | str, ...] | None) -> str:
    return "unknown" if shape is None else f"[{', '.join(map(str, shape))}]"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
