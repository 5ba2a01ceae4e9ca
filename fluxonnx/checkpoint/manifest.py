"""`fluxonnx.json`: the builds in a model directory, and what they were made from."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from fluxonnx.checkpoint.config import from_json, read_json, typed
from fluxonnx.checkpoint.digests import config_digest, content_digest
from fluxonnx.checkpoint.reading import exists, is_file, read_bounded, shown
from fluxonnx.checkpoint.safetensors import Tensor, fingerprint
from fluxonnx.errors import CheckpointError
from fluxonnx.files import atomic_write

FILE_NAME = "fluxonnx.json"
FORMAT_VERSION = 1

# The graphs whose weights may come from another file (those of `contract.FOLDERS` that have weights).
GRAPHS = ("text_encoder", "transformer", "vae_encoder", "vae_decoder", "references", "transformer_cached")

DEFAULT_PRECISION = "bf16"
DEFAULT_FLAVOUR = "ort"

# The last version whose manifests had no graph formats; its graphs are those of format 1.
LAST_WITHOUT_FORMAT = "0.1.2"


# More than any layer has rows or columns.
MOST_EXPONENTS = 1 << 24


@dataclass(frozen=True)
class Shape:
    """What a static build draws: pictures of one size from prompts of one length, one at a time, without references.

    Attributes:
        width: In pixels.
        height: Likewise.
        text_seq: Tokens of a prompt with its padding.
    """

    width: int
    height: int
    text_seq: int

    def __str__(self) -> str:
        """Return it as names of builds and files have it: 512x512-512."""
        return f"{self.width}x{self.height}-{self.text_seq}"

    @property
    def flags(self) -> str:
        """The flags of `fluxonnx export` that ask for it."""
        return f"--shape {self.width}x{self.height} --text-seq {self.text_seq}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read what `str` returns; raises ValueError."""
        if not (found := re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})-([1-9]\d{0,6})", text)):
            raise ValueError(f"{shown(text)} is no shape such as 512x512-512")
        return cls(*map(int, found.groups()))


# What `fault` says of a file that somebody edited, damaged or exchanged.
NOT_AS_EXPORTED = "is not the file that was exported"


def build_name(precision: str, flavour: str, shape: Shape | None = None) -> str:
    """Name a build: "bf16", "fp32", "bf16.portable", "fp16.portable.512x512-512", ..."""
    return ".".join([precision, *([] if flavour == DEFAULT_FLAVOUR else [flavour]), *([str(shape)] if shape else [])])


def graph_file(component: str, precision: str, flavour: str, shape: Shape | None = None) -> str:
    """Name a graph's file: transformer.onnx for the default build, transformer.fp32.portable.onnx for another."""
    parts = [component]
    if precision != DEFAULT_PRECISION:
        parts.append(precision)
    if flavour != DEFAULT_FLAVOUR:
        parts.append(flavour)
    if shape:
        parts.append(str(shape))
    return ".".join([*parts, "onnx"])


@dataclass
class Component:
    """One exported graph.

    Attributes:
        graph: Its file.
        exporter_version: The version of fluxonnx that wrote it.
        sources: `content_digest` of the weight files that it was made from and may depend on; those of a checkpoint
            elsewhere are relative to that.
        weights: The weight files of the build that it uses.
        nodes: Number of nodes.
        parameters: Number of parameters.
        bytes_written: Size of the graph and of the weight file, if that was written.
        self_contained: Whether it needs no weights but those of the build.
        graph_format: `contract.GRAPH_FORMAT` of the exporter; 0 where it is not known.
        exporter_digest: `exporter_digest` of the exporter; "" where it is not known.
        files: `content_digest` of the graph and of each of `weights`; none in manifests of older versions.
        configs: `config_digest` of the config files that it was made from; none in manifests of older versions.
        out_layers: Of the text encoder: the hidden states in prompt_embeds.
        errors: Of layers whose weights are rounded: the relative error of a product with normal activations, estimated
            from the weights.
        kept: Those of these layers that stay as in the checkpoint, because their error would be too large.
        unfinished: Whether it is being exported again, or was when that was interrupted; then it can't be used.
        scaling: By what the rows and columns of weights were multiplied for rounding, see `packed_scalings`; None in
            manifests of older versions.
    """

    graph: str
    exporter_version: str
    sources: dict[str, str]
    weights: list[str]
    nodes: int
    parameters: int
    bytes_written: int
    self_contained: bool = False
    graph_format: int = 0
    exporter_digest: str = ""
    files: dict[str, str] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)
    out_layers: list[int] | None = None
    errors: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    unfinished: bool = False
    scaling: dict[str, dict[str, str]] | None = None

    def __post_init__(self) -> None:
        """Give manifests of the last version without graph formats theirs."""
        if not self.graph_format and self.exporter_version == LAST_WITHOUT_FORMAT:
            self.graph_format = 1


@dataclass(frozen=True)
class BuildSettings:
    """The settings of a build, as the exporter takes them; what does not apply to its precision is None or False.

    Attributes:
        keep: A regular expression for the linears that are not quantised.
        block: Weights that share a scale.
        rotate: Whether all inputs are mixed by Hadamard matrices.
        saturating: Whether 8-bit weights are rounded so that pairs of products can be added in 16 bits.
        parts: Names of the files that replaced the weights of graphs, by the graphs' names.
        shape: What a static build draws; None for a build of any size.
        shard_size: The most bytes of weights in a file; None for no limit.
    """

    keep: str | None = None
    block: int | None = None
    rotate: bool = False
    saturating: bool = False
    parts: dict[str, str] = field(default_factory=dict)
    shape: Shape | None = None
    shard_size: int | None = None


@dataclass
class Build:
    """The graphs of one precision and flavour; `settings` tell it from other builds of the same name."""

    precision: str
    flavour: str
    opset: int
    settings: dict[str, str] = field(default_factory=dict)
    components: dict[str, Component] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in the manifest."""
        return build_name(self.precision, self.flavour, self.shape)

    @property
    def shape(self) -> Shape | None:
        """What it draws, if it is static; None if it draws any size."""
        return Shape.parse(self.settings["shape"]) if "shape" in self.settings else None

    @property
    def flags(self) -> str:
        """The flags of `fluxonnx export` that name it."""
        return self.flags_for(self.shape)

    def flags_for(self, shape: Shape | None) -> str:
        """Return the flags of `fluxonnx export` for a build like it that draws `shape`; None for any size."""
        flags = [f"--precision {self.precision}"]
        flags += [f"--flavour {self.flavour}"] if self.flavour != DEFAULT_FLAVOUR else []
        flags += [shape.flags] if shape else []
        flags += [f"--shard-size {self.settings['shard_size']}"] if "shard_size" in self.settings else []
        return " ".join(flags)

    @property
    def parsed_settings(self) -> BuildSettings:
        """The settings, typed."""
        values = self.settings
        return BuildSettings(
            keep=values.get("keep") or None,
            block=int(values["block"]) if "block" in values else None,
            rotate=values.get("rotate") == "true",
            saturating=values.get("products") == "pairs",
            parts={name: values[name].rpartition(" ")[0] for name in GRAPHS if name in values},
            shape=self.shape,
            shard_size=int(values["shard_size"]) if "shard_size" in values else None,
        )


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
        with atomic_write(root / FILE_NAME) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the content


def packed_scalings(tensors: Iterable[Tensor]) -> dict[str, dict[str, str]]:
    """Return what tensors were multiplied by for rounding, by their names; nothing for those that were not.

    Of each tensor "rows" and "columns": the exponents of powers of two as int8, compressed, in base64.
    """
    found: dict[str, dict[str, str]] = {}
    for tensor in tensors:
        whole = tensor.whole or tensor
        for name in ("rows", "columns"):
            factors = getattr(whole.scaling, name, None)
            if factors is not None and (factors != 1).any():
                exponents = (np.frexp(factors)[1] - 1).astype(np.int8)
                text = base64.b64encode(zlib.compress(exponents.tobytes(), 9)).decode("ascii")
                found.setdefault(whole.name, {})[name] = text
    return found


def unpacked_scaling(packed: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return the factors, float32, of one tensor that `packed_scalings` returned as text.

    Raises:
        CheckpointError: The text is damaged.
    """
    found = {}
    try:
        for name in {"rows", "columns"} & packed.keys():
            exponents = zlib.decompressobj().decompress(base64.b64decode(packed[name]), MOST_EXPONENTS)
            found[name] = np.ldexp(np.float32(1), np.frombuffer(exponents, np.int8).astype(np.int32))
        return found
    except (ValueError, zlib.error):
        raise CheckpointError(f"{FILE_NAME} has a damaged scaling: export again with --force") from None


def read_manifest(root: Path) -> Manifest | None:
    """Read a model directory's manifest; None if nothing was exported yet.

    Raises:
        CheckpointError: The manifest is corrupt or of a newer format.
    """
    path = root / FILE_NAME
    if not exists(path):
        return None
    values = read_json(path, "export again with --force")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {shown(version)}, this fluxonnx knows {FORMAT_VERSION}: export again with --force"
        )
    try:
        manifest = from_json(Manifest, values, skip_unknown=True)
        for name, build in manifest.builds.items():
            if build.name != name or build.parsed_settings is None:
                raise ValueError(f"the build {shown(name)} has another name")
    except ValueError as error:
        raise CheckpointError(f"{path} is corrupt ({error}): export again with --force") from None
    return manifest


def salvaged_manifest(root: Path) -> tuple[Manifest, bool]:
    """Return what a model's maker wrote into a manifest that is damaged, and whether all of it was found."""
    manifest = Manifest()
    try:
        text = read_bounded(root / FILE_NAME).decode("utf-8", "replace")
    except OSError:
        return manifest, False
    hints, whole = get_type_hints(Manifest), True
    for name in ("text_encoder_out_layers", "defaults"):
        _, _, rest = text.partition(f'"{name}":')
        try:
            value, _ = json.JSONDecoder().raw_decode(rest.lstrip())
            setattr(manifest, name, typed(hints[name], value, name))
        except (ValueError, RecursionError):
            whole = False
    return manifest, whole


@lru_cache
def exporter_digest() -> str:
    """Return a digest of the source files that decide what graphs look like."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    named = (package / "contract.py", package / "ports.py")
    for path in sorted([*named, *package.glob("export/**/*.py"), *package.glob("checkpoint/*.py")]):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def is_source_checkout() -> bool:
    """Whether the package runs from a checkout, where an edited exporter keeps its version and its graph format."""
    return (Path(__file__).parent.parent.parent / "pyproject.toml").is_file()


def is_usable(root: Path, component: Component) -> bool:
    """Whether a graph can be run as it is; see `fault`."""
    return fault(root, component) is None


def fault(root: Path, component: Component) -> str | None:
    """Return why a graph can't be run as it is; None if it can.

    It has to be there with its weights, both as they were exported, and the checkpoint's weights that it points into
    have to be unchanged.
    """
    if component.unfinished:
        return f"{component.graph} was not finished"
    for name in (component.graph, *component.weights):
        if not is_file(root / name):
            return f"{name} is missing"
    for name, digest in component.files.items():
        if content_digest(root / name) != digest:
            return f"{name} {NOT_AS_EXPORTED}"
    changed = _changed(root, depended_on(component))
    return f"{changed} has changed" if changed else None


def changed_config(root: Path, component: Component, out_layers: list[int] | None = None) -> str | None:
    """Return the config file that a graph was made from, but that says something else now; None if there is none.

    Args:
        root: The model directory.
        component: The graph.
        out_layers: The manifest's `text_encoder_out_layers`.
    """
    if component.out_layers is not None and out_layers is not None and component.out_layers != out_layers:
        return FILE_NAME
    for name, digest in component.configs.items():
        # a self-contained build does not need the file
        if exists(root / name) and config_digest(root / name) != digest:
            return name
    return None


def is_current(root: Path, component: Component, graph_format: int, out_layers: list[int] | None = None) -> bool:
    """Whether a graph is usable, of this format, and made from the checkpoint and the configs as they are now.

    A self-contained build stays current when the checkpoint's weights are deleted. In a source checkout the exporter's
    code must be the same, too.
    """
    return (
        component.graph_format == graph_format
        and (not is_source_checkout() or component.exporter_digest == exporter_digest())
        and is_usable(root, component)
        and are_as_recorded(root, component)
        and changed_config(root, component, out_layers) is None
    )


def are_as_recorded(checkpoint: Path, component: Component) -> bool:
    """Whether those of a checkpoint's weight files that are there are the ones that a graph was made from."""
    return _changed(checkpoint, {n: d for n, d in component.sources.items() if exists(checkpoint / n)}) is None


def depended_on(component: Component) -> dict[str, str]:
    """Return the sources that a graph points into; weights from a file outside the directory are always copied."""
    if component.self_contained:
        return {}
    return {name: digest for name, digest in component.sources.items() if not Path(name).is_absolute()}


def _changed(root: Path, sources: dict[str, str]) -> str | None:
    for name, digest in sources.items():
        # the last versions recorded fingerprints, which have no prefix
        now = content_digest if ":" in digest else fingerprint
        if not is_file(root / name) or now(root / name) != digest:
            return name
    return None
