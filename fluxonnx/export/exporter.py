"""Which graphs are written, where to, and in an order that never leaves half of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import (
    Build,
    Component,
    Manifest,
    build_name,
    exporter_digest,
    graph_file,
    is_current,
    is_source_checkout,
    read_manifest,
)
from fluxonnx.checkpoint.safetensors import Tensor, fingerprint
from fluxonnx.contract import COMPONENTS, GRAPH_FORMAT, Architecture, open_checkpoint
from fluxonnx.errors import CheckpointError, ExportError, UsageError
from fluxonnx.export import weights
from fluxonnx.export.components import Target, build_graph, make_target, read_architecture
from fluxonnx.export.copying import copy_model
from fluxonnx.export.precisions import Precision
from fluxonnx.files import atomic_write, describe_os_error
from fluxonnx.version import __version__

# progress(what, bytes done, total bytes)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What was exported of one component; `seconds` is None where it was up to date already."""

    component: str
    graph: str
    nodes: int
    parameters: int
    bytes_written: int
    seconds: float | None


def export(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    transformer: str | Path | None = None,
    precision: str | Precision = "bf16",
    flavour: str = "ort",
    components: Sequence[str] | None = None,
    opset: int | None = None,
    keep: str | None = None,
    block: int | None = None,
    rotate: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Report]:
    """Export a checkpoint's graphs.

    Args:
        directory: A model directory in the Hugging Face layout of FLUX.2-klein.
        output: A folder for a self-contained copy (weights, configs, tokenizer, graphs); by default the graphs are
            written beside the checkpoint's folders. The copy of an fp16, int8 or int4 build has no weights but the
            build's own.
        transformer: A safetensors file that replaces the transformer's weights, with diffusers' or the original's
            names. Weights that ComfyUI's tools quantised (int8_tensorwise) stay the same integers: "int8".
        precision: "bf16" leaves the weights in the checkpoint's files as they are. "fp32" converts them. "fp16"
            converts them to half the size, and computes the products of the blocks and of the autoencoder in float16,
            for GPUs (on a CPU onnxruntime converts them to float32 when it loads them). "int8" and "int4" quantise the
            linears of the blocks. A `Precision` is used as it is.
        flavour: "ort" for onnxruntime, with its fused operators; "portable" for any runtime.
        components: The graphs to export, by the names of their files; all by default.
        opset: The ai.onnx opset; by default 23 for ort and 17 for portable (21 with int4).
        keep: For int8 and int4: linears whose names match this regular expression are not quantised.
        rotate: For int8: mix inputs by a Hadamard matrix, against outliers; a step takes a little longer.
        block: For int4: the number of weights that share a scale, 32, 64 (the default) or 128.
        force: Overwrite graphs that exist and differ.
        progress: Called with what is being written, the bytes done and the total.

    Returns:
        A report per component, in the order of their export.

    Raises:
        UsageError: An argument has an impossible value.
        CheckpointError: The checkpoint is incomplete, corrupt or of another kind.
        ExportError: The files can't be written, or exist and `force` is not given.
    """
    target = make_target(precision, flavour, opset, keep, block, rotate)
    names = select(components)
    say = progress or (lambda what, done, total: None)
    try:
        checkpoint = open_checkpoint(directory, transformer)
        root = checkpoint.root
        if output is not None:
            copy = copy_model(checkpoint, Path(output), say, not target.precision.self_contained)
            root = copy.root
            checkpoint = checkpoint if target.precision.self_contained else copy
        return _export_components(checkpoint, root, target, names, force, say)
    except OSError as error:
        place = error.filename2 or error.filename or directory
        raise ExportError(describe_os_error(error, place, "make a copy with fluxonnx export -d DIR -o COPY")) from error


def select(components: Sequence[str] | None) -> list[str]:
    """Return the components to export, in order.

    Raises:
        UsageError: One of them does not exist.
    """
    for name in components or ():
        if name not in COMPONENTS:
            raise UsageError(f"component {name!r} is unknown: choose from {', '.join(COMPONENTS)}")
    return [name for name in COMPONENTS if not components or name in components]


def _export_components(
    checkpoint: Checkpoint, root: Path, target: Target, names: list[str], force: bool, say: Progress
) -> list[Report]:
    manifest = _manifest(root, force)
    out_layers = tuple(manifest.text_encoder_out_layers) if manifest.text_encoder_out_layers else None
    sizes = read_architecture(checkpoint, out_layers)
    manifest.text_encoder_out_layers = list(sizes.text_encoder.out_layers)
    manifest.architecture = sizes.to_json()
    precision, flavour = target.precision.name, target.flavour
    name = build_name(precision, flavour)
    build = manifest.builds.get(name)
    settings = target.precision.settings() | _transformer(checkpoint)
    if build is None or (build.opset, build.settings) != (target.opset, settings):
        # Graphs of another opset or other settings are never mixed into one build.
        build = manifest.builds[name] = Build(precision, flavour, target.opset, settings)

    current = {} if force else {key: c for key, c in build.components.items() if is_current(root, c, GRAPH_FORMAT)}
    for component in names:
        if component not in current and not force:
            metadata = _metadata(checkpoint, component, target, sizes)
            _refuse_foreign(root / graph_file(component, precision, flavour), metadata)
    reports = []
    for component in names:
        file = graph_file(component, precision, flavour)
        if known := current.get(component):
            reports.append(Report(component, file, known.nodes, known.parameters, 0, None))
            continue
        start = time.perf_counter()
        build.components[component] = done = _export_component(checkpoint, root, component, sizes, target, say)
        manifest.save(root)
        seconds = time.perf_counter() - start
        reports.append(Report(component, file, done.nodes, done.parameters, done.bytes_written, seconds))
    return reports


def _manifest(root: Path, force: bool) -> Manifest:
    try:
        return read_manifest(root) or Manifest()
    except CheckpointError:
        if not force:
            raise
        return Manifest()


def _refuse_foreign(path: Path, metadata: dict[str, str]) -> None:
    """Refuse to overwrite a graph, unless it is ours with the same settings (of a killed export, say)."""
    if not path.exists():
        return
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # whatever it is, it is not ours
        raise ExportError(f"{path} exists and is not a graph: move it away, or overwrite it with --force") from None
    found = {prop.key: prop.value for prop in model.metadata_props}
    if {**found, "version": ""} != {**metadata, "version": ""}:
        raise ExportError(
            f"{path} exists and was made from another checkpoint or with other settings: overwrite it with --force"
        )


def _export_component(
    checkpoint: Checkpoint, root: Path, component: str, sizes: Architecture, target: Target, say: Progress
) -> Component:
    folder, precision = COMPONENTS[component], target.precision
    say(component, 0, 0)
    tensors: dict[str, Tensor] = {} if component == "conditioning" else checkpoint.tensors(folder)
    graph = build_graph(component, sizes, target, tensors, _metadata(checkpoint, component, target, sizes))
    # A copy does not depend on the checkpoint that it was made from.
    sources = sorted({weight.source.file for weight in graph.weights}) if root == checkpoint.root else []
    name = weights.weight_file(component, folder, precision.file_label(target.flavour))
    settings = {**_writer(), **precision.settings()} if precision.self_contained else {}
    stored = weights.place(graph, root, name, settings, lambda done, total: say(component, done, total))
    file = graph_file(component, precision.name, target.flavour)
    with atomic_write(root / file) as temporary:
        onnx.save(graph.model, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)
    return Component(
        graph=file,
        exporter_version=__version__,
        sources={_location(root, path): fingerprint(path) for path in sources},
        weights=[stored.name] if stored else [],
        nodes=len(graph.model.graph.node),
        parameters=graph.parameters,
        self_contained=precision.self_contained,
        bytes_written=(root / file).stat().st_size + (stored.bytes_written if stored else 0),
        graph_format=GRAPH_FORMAT,
        exporter_digest=exporter_digest(),
    )


def _writer() -> dict[str, str]:
    """Return what in the header of a weight file tells it from one that another exporter made of the same weights."""
    return {"graph_format": str(GRAPH_FORMAT), **({"exporter": exporter_digest()} if is_source_checkout() else {})}


def _location(root: Path, path: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _transformer(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the setting of a build whose transformer's weights come from another file."""
    file = checkpoint.transformer
    return {"transformer": f"{file.name} {fingerprint(file)[:12]}"} if file else {}


def _metadata(checkpoint: Checkpoint, component: str, target: Target, sizes: Architecture) -> dict[str, str]:
    return {
        "producer": "fluxonnx",
        "version": __version__,
        "model": checkpoint.name,
        "component": component,
        "precision": target.precision.name,
        "flavour": target.flavour,
        "opset": str(target.opset),
        **target.precision.settings(),
        **(_transformer(checkpoint) if component == "transformer" else {}),
        "architecture": sizes.component_json(component),
    }
