"""Which graphs are written, where to, and in an order that never leaves half of one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from fluxonnx.checkpoint.digests import config_digest, content_digest
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import (
    FILE_NAME,
    Build,
    Component,
    Manifest,
    are_as_recorded,
    build_name,
    exporter_digest,
    graph_file,
    is_current,
    is_source_checkout,
    read_manifest,
    salvaged_manifest,
)
from fluxonnx.checkpoint.reading import check_readable, exists
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.contract import COMPONENTS, GRAPH_FORMAT, Architecture, open_checkpoint
from fluxonnx.errors import CheckpointError, ExportError
from fluxonnx.export import links, weights
from fluxonnx.export.components import Target, build_graph, make_passes, read_architecture, select
from fluxonnx.export.copying import copy_model, prepare_copy
from fluxonnx.export.graph import Graph
from fluxonnx.export.parts import as_text, notices, replaced_parts, stated, without_parts
from fluxonnx.export.precisions import Precision
from fluxonnx.files import atomic_write, describe_os_error, exclusive, probe, remove_leftovers, require_text
from fluxonnx.version import __version__

# progress(what, bytes done, total bytes)
Progress = Callable[[str, int, int], None]


# Layers that a message names.
MOST_LISTED = 3


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
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    precision: str | Precision = "bf16",
    text_encoder_precision: str | None = None,
    flavour: str = "ort",
    components: Sequence[str] | None = None,
    opset: int | None = None,
    keep: str | None = None,
    block: int | None = None,
    rotate: bool = False,
    force: bool = False,
    renew: bool = False,
    progress: Progress | None = None,
) -> list[Report]:
    """Export a checkpoint's graphs.

    Other exports to the same folder are waited for. If this one is interrupted, the next one goes on.

    Args:
        directory: A model directory in the Hugging Face layout of FLUX.2-klein.
        output: A folder for a self-contained copy (weights, configs, tokenizer, graphs); by default the graphs are
            written beside the checkpoint's folders. The copy of an fp16, int8 or int4 build has no weights but the
            build's own.
        transformer: A file that replaces the transformer's weights, or the folder of one: safetensors or GGUF, with
            any names and formats of docs/checkpoints.md. Weights that ComfyUI's tools quantised (int8_tensorwise) stay
            the same integers with "int8"; other precisions restore them. A file that does not say whether they are
            rotated is warned of.
        text_encoder: Likewise for the text encoder.
        vae: Likewise for the autoencoder.
        precision: "bf16" leaves the weights in the checkpoint's files as they are. "fp32" converts them. "fp16"
            converts them to half the size, and computes the products of the blocks and of the autoencoder in float16,
            for GPUs (on a CPU onnxruntime converts them to float32 when it loads them). "int8" and "int4" quantise the
            linears of the blocks. A `Precision` is used as it is.
        text_encoder_precision: The precision of the text encoder, by default as `precision`. Its graph becomes part of
            the build of that precision.
        flavour: "ort" for onnxruntime, with its fused operators; "portable" for any runtime.
        components: The graphs to export, by the names of their files; all by default.
        opset: The ai.onnx opset; by default 23 for ort and 17 for portable (21 with int4).
        keep: For int8 and int4: linears whose names match this regular expression are not quantised.
        rotate: For int8: mix inputs by a Hadamard matrix, against outliers; a step takes a little longer.
        block: For int4: the number of weights that share a scale, 32, 64 (the default) or 128.
        force: Write everything anew, and overwrite graphs that exist and differ.
        renew: Overwrite graphs that exist and differ, but keep those that are up to date.
        progress: Called with what is being written, the bytes done and the total.

    Returns:
        A report per component, in the order of their export.

    Raises:
        UsageError: An argument has an impossible value.
        CheckpointError: The checkpoint is incomplete, corrupt or of another kind.
        ExportError: The files can't be written, or exist and `force` is not given.
    """
    passes = make_passes(
        precision, text_encoder_precision, select(components), flavour, opset, keep=keep, block=block, rotate=rotate
    )
    say = progress or (lambda what, done, total: None)
    try:
        checkpoint = open_checkpoint(directory, transformer, text_encoder=text_encoder, vae=vae)
        root = checkpoint.root if output is None else Path(output)
        require_text(root)
        copied: list[Path] | None = None
        if root.exists() and root.resolve() == checkpoint.root.resolve():
            root = checkpoint.root
        else:
            copied = prepare_copy(checkpoint, root, _copied_weights(passes))
        with exclusive(root):
            origin = checkpoint.root
            copy = checkpoint if copied is None else copy_model(checkpoint, copied, root, say)
            reports = []
            for target, names in passes:
                source = checkpoint if target.precision.self_contained else copy
                manifest = _manifest(root, origin, force)
                reports += _export_components(source, root, manifest, target, names, force, renew, say)
            return reports
    except OSError as error:
        place = error.filename2 or error.filename or directory
        raise ExportError(describe_os_error(error, place, "make a copy with fluxonnx export -d DIR -o COPY")) from error


def _copied_weights(passes: Sequence[tuple[Target, Sequence[str]]]) -> set[str]:
    """Return the folders whose weights a copy needs: all, but for those of graphs that have their own."""
    if len(passes) == 1:
        return set() if passes[0][0].precision.self_contained else set(COMPONENTS.values())
    return {COMPONENTS[name] for target, names in passes for name in names if not target.precision.self_contained}


def _export_components(
    checkpoint: Checkpoint,
    root: Path,
    manifest: Manifest,
    target: Target,
    names: list[str],
    force: bool,
    renew: bool,
    say: Progress,
) -> list[Report]:
    out_layers = tuple(manifest.text_encoder_out_layers) if manifest.text_encoder_out_layers else None
    sizes = read_architecture(checkpoint, out_layers)
    manifest.text_encoder_out_layers = list(sizes.text_encoder.out_layers)
    manifest.architecture = sizes.to_json()
    precision, flavour = target.precision.name, target.flavour
    name = build_name(precision, flavour)
    build = recorded = manifest.builds.get(name)
    settings, replaced = target.precision.settings(), replaced_parts(checkpoint)
    if build is None or (build.opset, without_parts(build.settings)) != (target.opset, settings):
        # Graphs of another opset or other settings are never mixed into one build.
        build = manifest.builds[name] = Build(precision, flavour, target.opset, settings)
    withdrawn = recorded is not None and recorded is not build

    usable = {} if force else build.components
    current = {key: c for key, c in usable.items() if _is_current(root, checkpoint, c, manifest)}
    for component in COMPONENTS:
        if build.settings.get(component) != replaced.get(component):
            current.pop(component, None)
    pending = [component for component in names if component not in current]
    # Whatever can be wrong with the checkpoint is found before anything is written.
    graphs = {component: _build_graph(checkpoint, root, component, sizes, target) for component in pending}
    for notice in notices(checkpoint, root, graphs, target):
        warnings.warn(notice, stacklevel=3)
    for component, graph in graphs.items():
        if graph.kept:
            warnings.warn(
                f"{component}: {_listed(graph.kept)} would be more than {target.precision.most_error:.0%} wrong in "
                f"{precision}, and so stay{'s' if len(graph.kept) == 1 else ''} as in the checkpoint",
                stacklevel=2,
            )
    for component in pending:
        if not force and not (renew and recorded and component in recorded.components):
            metadata = _metadata(checkpoint, component, target, sizes)
            _refuse_foreign(root / graph_file(component, precision, flavour), metadata, renew)
    if pending:
        probe(root / FILE_NAME)
    known = set() if force else _known_files(root, checkpoint, manifest)
    reports = []
    for component in names:
        file = graph_file(component, precision, flavour)
        if component not in pending:
            found = current[component]
            reports.append(Report(component, file, found.nodes, found.parameters, 0, None))
            continue
        start = time.perf_counter()
        say(component, 0, 0)
        if _withdraw(build, component, replaced) or withdrawn:
            manifest.save(root)
            withdrawn = False
        done = _write_component(checkpoint, root, component, graphs.pop(component), sizes, target, known, force, say)
        build.components[component] = done
        build.settings = {key: value for key, value in build.settings.items() if key != component}
        build.settings |= {key: value for key, value in replaced.items() if key == component}
        manifest.save(root)
        seconds = time.perf_counter() - start
        reports.append(Report(component, file, done.nodes, done.parameters, done.bytes_written, seconds))
    if len(names) == len(COMPONENTS):
        _remove_leftovers(root)
    return reports


def _listed(layers: list[str]) -> str:
    """Return the names of a few layers, and how many more there are."""
    more = f" and {len(layers) - MOST_LISTED} more" if len(layers) > MOST_LISTED else ""
    return ", ".join(layers[:MOST_LISTED]) + more


def _is_current(root: Path, checkpoint: Checkpoint, component: Component, manifest: Manifest) -> bool:
    current = is_current(root, component, GRAPH_FORMAT, manifest.text_encoder_out_layers)
    return current and are_as_recorded(checkpoint.root, component)


def _known_files(root: Path, checkpoint: Checkpoint, manifest: Manifest) -> set[str]:
    """Return the weight files of all builds that are as they were written, from the checkpoint as it is now."""
    return {
        name
        for build in manifest.builds.values()
        for component in build.components.values()
        if component.files and _is_current(root, checkpoint, component, manifest)
        for name in component.weights
    }


def _withdraw(build: Build, component: str, replaced: dict[str, str]) -> bool:
    """Note that a graph can't be used, before its files are touched: they may stay half exchanged.

    An entry of the same weights keeps what it was made from, for the export that goes on with it. One of other weights
    is forgotten: whoever interrupts an export from another file does not ask for that file any more. Returns whether
    there was an entry.
    """
    known = build.components.get(component)
    if build.settings.get(component) != replaced.get(component):
        build.components.pop(component, None)
        build.settings = {key: value for key, value in build.settings.items() if key != component}
    elif known is not None:
        build.components[component] = replace(known, unfinished=True)
    return known is not None


def _remove_leftovers(root: Path) -> None:
    """Remove what killed exports left, which can be copies of all weights."""
    for folder in {root, *(root / folder for folder in COMPONENTS.values())}:
        for pattern in (".*.safetensors.partial", ".*.safetensors.*.tmp", ".*.onnx.*.tmp"):
            remove_leftovers(folder, pattern)


def _manifest(root: Path, origin: Path, force: bool) -> Manifest:
    """Read a manifest; what it does not say, and the checkpoint's that is copied does, is taken from there."""
    manifest = _read_manifest(root, force)
    if origin != root:
        maker = _read_manifest(origin, force)
        manifest.text_encoder_out_layers = maker.text_encoder_out_layers or manifest.text_encoder_out_layers
        manifest.defaults = manifest.defaults or maker.defaults
    return manifest


def _read_manifest(root: Path, force: bool) -> Manifest:
    try:
        return read_manifest(root) or Manifest()
    except CheckpointError:
        if not force:
            raise
        manifest, whole = salvaged_manifest(root)
        if not whole:
            warnings.warn(
                f'{root / FILE_NAME} was damaged: it may have held "text_encoder_out_layers" and "defaults" of the '
                "model, which are the usual ones now",
                stacklevel=2,
            )
        return manifest


def _refuse_foreign(path: Path, metadata: dict[str, str], renew: bool) -> None:
    """Refuse to overwrite a graph, unless it is ours with the same settings (of a killed export, say) or to renew."""
    if not exists(path):
        return
    try:
        check_readable(path)  # a pipe would never end
        model = onnx.load(path, load_external_data=False)
    except Exception:  # whatever it is, it is not ours
        raise ExportError(f"{path} exists and is not a graph: move it away, or overwrite it with --force") from None
    found = {prop.key: prop.value for prop in model.metadata_props}
    if renew and found.get("producer") == metadata["producer"]:
        return
    if {**found, "version": ""} != {**metadata, "version": ""}:
        raise ExportError(
            f"{path} exists and was made from another checkpoint or with other settings: overwrite it with --force"
        )


def _weight_file(component: str, target: Target) -> str:
    return weights.weight_file(component, COMPONENTS[component], target.precision.file_label(target.flavour))


def _build_graph(checkpoint: Checkpoint, root: Path, component: str, sizes: Architecture, target: Target) -> Graph:
    tensors: dict[str, Tensor] = {} if component == "conditioning" else checkpoint.tensors(COMPONENTS[component])
    graph = build_graph(component, sizes, target, tensors, _metadata(checkpoint, component, target, sizes))
    weights.check_places(graph, root, _weight_file(component, target))
    return graph


def _write_component(
    checkpoint: Checkpoint,
    root: Path,
    component: str,
    graph: Graph,
    sizes: Architecture,
    target: Target,
    known: set[str],
    force: bool,
    say: Progress,
) -> Component:
    precision = target.precision
    sources = _sources(checkpoint, root, graph)
    name = _weight_file(component, target)
    settings = {**_writer(), **precision.settings()} if precision.self_contained else {}
    stored = weights.place(
        graph,
        root,
        name,
        settings,
        lambda done, total: say(component, done, total),
        name in known,
        not force,
        checkpoint.may_link,
    )
    file = graph_file(component, precision.name, target.flavour)
    with atomic_write(root / file) as temporary:
        onnx.save(graph.model, temporary)
        links.check(graph.model, temporary, file)
    written = [file, *stored.names]
    config = _location(checkpoint.root, checkpoint.config_path(COMPONENTS[component]))
    return Component(
        graph=file,
        exporter_version=__version__,
        sources=sources,
        weights=stored.names,
        nodes=len(graph.model.graph.node),
        parameters=graph.parameters,
        self_contained=precision.self_contained,
        bytes_written=(root / file).stat().st_size + stored.bytes_written,
        graph_format=GRAPH_FORMAT,
        exporter_digest=exporter_digest(),
        files={name: content_digest(root / name) for name in written},
        configs={config: config_digest(checkpoint.root / config)},
        out_layers=list(sizes.text_encoder.out_layers) if component == "text_encoder" else None,
        errors=graph.errors,
        kept=graph.kept,
    )


def _sources(checkpoint: Checkpoint, root: Path, graph: Graph) -> dict[str, str]:
    """Return the digests of the files that a graph is made from.

    A copy does not depend on them; but if it is made again, it must show whether the checkpoint is the same.
    """
    files = sorted({weight.source.file for weight in graph.weights})
    if root != checkpoint.root:
        files = [file for file in files if file.is_relative_to(checkpoint.root)]
    return {_location(checkpoint.root, path): content_digest(path) for path in files}


def _writer() -> dict[str, str]:
    """Return what in the header of a weight file tells it from one that another exporter made of the same weights."""
    return {"graph_format": str(GRAPH_FORMAT), **({"exporter": exporter_digest()} if is_source_checkout() else {})}


def _location(root: Path, path: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _metadata(checkpoint: Checkpoint, component: str, target: Target, sizes: Architecture) -> dict[str, str]:
    return {
        "producer": "fluxonnx",
        "version": __version__,
        "model": as_text(checkpoint.name),
        "component": component,
        "precision": target.precision.name,
        "flavour": target.flavour,
        "opset": str(target.opset),
        **target.precision.settings(),
        **stated(checkpoint, component),
        "architecture": sizes.component_json(component),
    }
