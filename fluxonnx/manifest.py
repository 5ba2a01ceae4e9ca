"""`fluxonnx.json`: which builds a model directory holds, and what they were made from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fluxonnx.checkpoint import fingerprint, read_json
from fluxonnx.errors import CheckpointError
from fluxonnx.files import replacing

FILE_NAME = "fluxonnx.json"
FORMAT_VERSION = 1

# Every graph of a build, in the order in which a picture needs them, and the checkpoint folder it comes from.
COMPONENTS = {
    "text_encoder": "text_encoder",
    "conditioning": "transformer",
    "transformer": "transformer",
    "vae_encoder": "vae",
    "vae_decoder": "vae",
}

DEFAULT_PRECISION = "bf16"
DEFAULT_FLAVOUR = "ort"


def build_name(precision: str, flavour: str) -> str:
    """Name a build: "bf16", "fp32", "bf16.portable", ..."""
    return precision if flavour == DEFAULT_FLAVOUR else f"{precision}.{flavour}"


def graph_file(component: str, precision: str, flavour: str) -> str:
    """Name a graph's file: transformer.onnx for the default build, transformer.fp32.portable.onnx for another."""
    parts = [component]
    if precision != DEFAULT_PRECISION:
        parts.append(precision)
    if flavour != DEFAULT_FLAVOUR:
        parts.append(flavour)
    return ".".join([*parts, "onnx"])


@dataclass
class Component:
    """One exported graph: its file, and the fingerprints of the weight files it was made from."""

    graph: str
    exporter_version: str
    sources: dict[str, str]
    weights: list[str]
    nodes: int
    parameters: int
    bytes_written: int
    self_contained: bool = False


@dataclass
class Build:
    """The graphs of one precision and flavour."""

    precision: str
    flavour: str
    opset: int
    settings: dict[str, str] = field(default_factory=dict)
    components: dict[str, Component] = field(default_factory=dict)


@dataclass
class Manifest:
    """The content of fluxonnx.json.

    `text_encoder_out_layers` and `defaults` (width, height, max_sequence_length) may be written by a model's maker.
    """

    text_encoder_out_layers: list[int] | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, int] = field(default_factory=dict)
    builds: dict[str, Build] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def save(self, root: Path) -> None:
        """Write the manifest, whole or not at all."""
        with replacing(root / FILE_NAME) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


def read_manifest(root: Path) -> Manifest | None:
    """Read a model directory's manifest; None if it was never exported.

    Raises:
        CheckpointError: The manifest is corrupt or of a newer format.
    """
    path = root / FILE_NAME
    if not path.exists():
        return None
    values = read_json(path)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version!r}, this fluxonnx knows {FORMAT_VERSION}: export again with --force"
        )
    try:
        builds = values.pop("builds")
        manifest = Manifest(**values)
        for name, build in builds.items():
            components = {key: Component(**value) for key, value in build.pop("components").items()}
            manifest.builds[name] = Build(**build, components=components)
    except (TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path} is corrupt: export again with --force") from None
    return manifest


def is_current(root: Path, component: Component, version: str) -> bool:
    """Whether a graph and its weights are still there, made by this version from the checkpoint as it is now.

    A build that has all its weights in files of its own stays current when the checkpoint's are deleted; so does one
    with weights from a file elsewhere, which are always copied.
    """
    sources = {
        name: digest
        for name, digest in component.sources.items()
        if (root / name).exists() or not (component.self_contained or Path(name).is_absolute())
    }
    return (
        component.exporter_version == version
        and all((root / name).is_file() for name in (component.graph, *component.weights, *sources))
        and all(fingerprint(root / name) == digest for name, digest in sources.items())
    )
