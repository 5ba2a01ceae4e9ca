"""Digests of exported graphs and weight files: what must not change unless somebody means it to.

    python -m tests.digests            # compare with tests/golden/digests.json
    python -m tests.digests --update   # after a change that is meant: write them anew

A digest covers nodes, attributes, names, order, types, shapes and external data. Left out are versions, and the values
of large constants of floats, which differ in the last bits from one processor to the next (numpy's cosines do).

The checkpoints hold small multiples of 1/64: every sum of them is exact, so that quantised weights do not depend on
the order in which a processor adds.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto
from safetensors.numpy import load_file, save_file

from fluxonnx.contract import COMPONENTS, KV_COMPONENTS
from fluxonnx.export.exporter import export
from fluxonnx.export.precisions import PRECISIONS, Int8, Precision, make_precision
from tests import comfyui
from tools.architectures import Architecture, TextEncoderSize, VaeSize, tiny
from tools.make_checkpoint import make_checkpoint

GOLDEN = Path(__file__).parent / "golden/digests.json"

# Metadata of a weight file that says by which version, and from which files, it was made.
UNSTABLE = ("version", "graph_format", "exporter", "source")

# Floats of a constant up to this many are part of its name and of its digest.
FEW = 4

ARCHITECTURES = {
    # an odd number of heads, biases, an untied text encoder, in several files
    "odd": Architecture(
        TextEncoderSize(hidden=48, layers=4, heads=3, kv_heads=1, head_dim=16, intermediate=80, tied=False, bias=True),
        tiny(
            TextEncoderSize(48, 4, 3, 1, 16, 80),
            VaeSize((16, 24, 32, 32), 8, layers_per_block=1, groups=4),
            3,
            32,
            2,
            2,
        ).transformer,
        VaeSize((16, 24, 32, 32), 8, layers_per_block=1, groups=4, decoder_channels=(12, 16, 24, 40)),
        text_encoder_shards=2,
    ),
    # wide enough for panels of columns, feed-forwards in more than one value, and an int8 decoder
    "wide": tiny(
        TextEncoderSize(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=3328),
        VaeSize((16, 16, 256), 8, layers_per_block=1, groups=4),
        4,
        64,
        1,
        2,
    ),
}
DTYPES = {"odd": "fp32", "wide": "bf16"}


@dataclass(frozen=True)
class Variant:
    """A way to export; `exact` is what the processor says of its 8-bit products, `build` are arguments of `export`."""

    precision: str
    label: str = ""
    exact: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.precision}-{self.label}" if self.label else self.precision


# References that are looked at once, by graphs with the transformer's weights.
KV = ("transformer", *KV_COMPONENTS)
VARIANTS = [
    Variant("bf16"),
    Variant("fp32"),
    Variant("fp16"),
    Variant("bf16-native"),
    Variant("int8"),
    Variant("int8", "pairs", exact=False),
    Variant("int8", "rotated", options={"rotate": True}),
    Variant("int8", "kept", options={"keep": r"layers\.1\.|blocks\.0\..*to_out"}),
    Variant("int8", "comfyui"),
    Variant("int8", "comfyui-pairs", exact=False),
    Variant("int4"),
    Variant("int4", "blocks-of-32", options={"block": 32}),
    Variant("fp16", "static", build={"shape": (96, 64), "text_seq": 24}),
    Variant("int8", "static", build={"shape": (96, 64), "text_seq": 24}),
    Variant("fp32", "shards", build={"shard_size": 500_000}),
    *(Variant(name, "kv", build={"components": KV}) for name in ("bf16", "fp16", "int8")),
]


def checkpoint(path: Path, name: str) -> None:
    """Write the checkpoint of one of `ARCHITECTURES`."""
    make_checkpoint(path, ARCHITECTURES[name], dtype=DTYPES[name])
    for number, file in enumerate(sorted(path.glob("*/*.safetensors"))):
        bits = np.random.RandomState(number)
        tensors = load_file(file)
        for key in sorted(tensors):
            if np.issubdtype(tensors[key].dtype, np.floating) or tensors[key].dtype == ml_dtypes.bfloat16:
                values = bits.randint(-127, 128, tensors[key].shape) / 64
                tensors[key] = values.astype(tensors[key].dtype)
        save_file(tensors, file)


def digests(root: Path, name: str, variant: Variant, flavour: str) -> dict[str, str]:
    """Export a build of one of `ARCHITECTURES`, and return a digest per graph and per weight file."""
    model = root / "model"
    checkpoint(model, name)
    transformer = None
    if variant.label.startswith("comfyui"):
        group = 16 if name == "odd" else 64
        file = root / "comfyui.safetensors"
        source = model / "transformer/diffusion_pytorch_model.safetensors"
        comfyui.write(source, file, comfyui.Form(group=group if variant.exact else 0))
        transformer = file
    before = {file for file in model.rglob("*") if file.is_file()}
    export(model, precision=_precision(variant), flavour=flavour, transformer=transformer, **variant.build)
    written = sorted({file for file in model.rglob("*") if file.is_file()} - before)
    found = {}
    for file in written:
        if file.suffix == ".onnx":
            found[file.name.split(".")[0]] = _digest(graph_text(onnx.load(file, load_external_data=False)))
        elif file.suffix == ".safetensors":
            found[file.relative_to(model).as_posix()] = _digest(weights_text(file))
    assert set(variant.build.get("components", COMPONENTS)) <= found.keys()
    return {f"{name}/{variant.id}/{flavour}/{key}": value for key, value in found.items()}


def _precision(variant: Variant) -> Precision:
    if variant.precision == "int8":
        return Int8(saturating=not variant.exact, **variant.options)
    return make_precision(variant.precision, **variant.options)


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def graph_text(model: onnx.ModelProto) -> Iterator[str]:
    """Yield all of a graph that must not change, line by line."""
    graph = model.graph
    names: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name.startswith("constant/") and _is_large(tensor):
            names[tensor.name] = f"{tensor.name.rpartition('/')[0]}/#{len(names)}"
    yield f"ir {model.ir_version} opsets {[(item.domain, item.version) for item in model.opset_import]}"
    for item in sorted(model.metadata_props, key=lambda item: item.key):
        if item.key not in ("version", "transformer"):
            yield f"metadata {item.key} {item.value}"
    for info in (*graph.input, *graph.output, *graph.value_info):
        yield f"value {info.name} {_type(info.type)} {info.doc_string}"
    for tensor in graph.initializer:
        name, place = names.get(tensor.name, tensor.name), [(item.key, item.value) for item in tensor.external_data]
        value = "" if place or _is_large(tensor) else onnx.numpy_helper.to_array(tensor).tobytes().hex()
        yield f"initializer {name} {tensor.data_type} {list(tensor.dims)} {place} {value}"
    for node in graph.node:
        inputs = [names.get(name, name) for name in node.input]
        attributes = sorted(f"{item.name}={onnx.helper.get_attribute_value(item)}" for item in node.attribute)
        yield f"node {node.domain} {node.op_type} {node.name} {inputs} {list(node.output)} {attributes}"


def _is_large(tensor: TensorProto) -> bool:
    floats = tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return floats and not tensor.external_data and int(np.prod(tensor.dims)) > FEW


def _type(value: onnx.TypeProto) -> str:
    tensor = value.tensor_type
    dims = [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in tensor.shape.dim]
    return f"{tensor.elem_type} {dims}"


def weights_text(file: Path) -> Iterator[str]:
    """Yield the header of a weight file without versions and fingerprints, and the digest of its data."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        data = hashlib.sha256(stream.read()).hexdigest()
    metadata = header.pop("__metadata__")
    yield json.dumps({key: value for key, value in metadata.items() if key not in UNSTABLE}, sort_keys=True)
    yield json.dumps(header)
    yield data


def all_digests() -> dict[str, str]:
    """Return the digests of all builds."""
    found: dict[str, str] = {}
    for name in ARCHITECTURES:
        for variant in VARIANTS:
            for flavour in PRECISIONS[variant.precision].flavours:
                with tempfile.TemporaryDirectory() as folder:
                    found |= digests(Path(folder), name, variant, flavour)
    return found


def main() -> int:
    """Compare or update; returns the exit code."""
    found = all_digests()
    if "--update" in sys.argv[1:]:
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
        return 0
    expected = json.loads(GOLDEN.read_text("utf-8"))
    changed = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    print("\n".join(changed) or f"{len(found)} digests, all as they were")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
