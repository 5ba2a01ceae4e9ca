"""What an exported graph says about itself, read without a library for ONNX, which would take longer to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxonnx.checkpoint.reading import parse_json, read_bounded
from fluxonnx.errors import CheckpointError

# How an entry of `metadata_props` begins: field 1, the length and the text of its key, then field 2, its value.
# Source: StringStringEntryProto, onnx.proto; https://protobuf.dev/programming-guides/encoding.
ARCHITECTURE = b"\x0a\x0carchitecture\x12"


def graph_architecture(path: Path) -> dict[str, Any]:
    """Return the sizes in a graph's metadata; nothing if it has none, as a graph that other tools wrote anew may.

    Raises:
        CheckpointError: The graph can't be read.
    """
    try:
        content = read_bounded(path)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    _, found, rest = content.rpartition(ARCHITECTURE)  # metadata are behind the graph
    if not found:
        return {}
    length, end = 0, 0
    for shift, byte in enumerate(rest[:10]):  # a varint: 7 bits a byte, the lowest first
        length |= (byte & 0x7F) << (7 * shift)
        end = shift + 1
        if byte < 0x80:
            break
    try:
        value = parse_json(rest[end : end + length])
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
