"""Which graphs are written, where to, and in an order that never leaves half of one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from fluxonnx.checkpoint.digests import config_digest, content_digest
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import (
    FILE_NAME,
    Build,
    Component,
    Manifest,
    Shape,
    build_name,
    exporter_digest,
    graph_file,
    packed_scalings,
    read_manifest,
)
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.contract import (
    COMPONENTS,
    FOLDERS,
    GRAPH_FORMAT,
    KV_COMPONENTS,
    MAX_SEQUENCE_LENGTH,
    Architecture,
    open_checkpoint,
)
from fluxonnx.errors import ExportError, UsageError
from fluxonnx.export import links, weights
from fluxonnx.export.components import Target, build_graph, make_passes, prepare, read_architecture, select
from fluxonnx.export.conditioning import POSITION_BASE
from fluxonnx.export.copying import copy_model, prepare_copy
from fluxonnx.export.graph import Graph
from fluxonnx.export.parts import notices, replaced_parts, without_parts
from fluxonnx.export.precisions import Precision, Prepared
from fluxonnx.export.record import (
    is_as_made,
    known_files,
    location,
    manifest_of,
    metadata_of,
    refuse_foreign,
    remove_replaced,
    sources_of,
    withdraw,
    writer,
)
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
    kv: bool | None = None,
    opset: int | None = None,
    keep: str | None = None,
    block: int | None = None,
    rotate: bool = False,
    shape: tuple[int, int] | None = None,
    text_seq: int | None = None,
    shard_size: int | None = None,
    force: bool = False,
    renew: bool = False,
    progress: Progress | None = None,
) -> list[Report]:
    """Export a checkpoint's graphs.

    Other exports to the same folder are waited for. If this one is interrupted, the next one goes on.

    Args:
        directory: A model directory in the Hugging Face layout of FLUX.2-klein.
        output: A folder for a self-contained copy (weights, configs, tokenizer, graphs); by default the graphs are
            written beside the checkpoint's folders. The copy of a build that is not bf16 has no weights but the
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
        kv: Whether all graphs are also those that look at references once, and keep their keys and values for all
            steps; None for models that were made for it (FLUX.2-klein-9b-kv).
        opset: The ai.onnx opset; by default 23 for ort and 17 for portable (21 with int4).
        keep: For int8 and int4: linears whose names match this regular expression are not quantised.
        rotate: For int8: mix inputs by a Hadamard matrix, against outliers; a step takes a little longer.
        block: For int4: the number of weights that share a scale, 32, 64 (the default) or 128.
        shape: Make a static build, whose sizes are all numbers, for pictures of this width and height in pixels, one at
            a time and without references; multiples of 16. Any size by default.
        text_seq: For a static build: the tokens of a prompt with its padding, from 1 to 512; the model's default.
        shard_size: Divide the weights of a graph into files of at most this many bytes, but for single weights that are
            larger.
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
    if text_seq is not None and shape is None:
        raise UsageError("--text-seq is for a static build: say which size it draws with --shape")
    if kv and shape is not None:
        raise UsageError("--kv is for references, but static builds take none: leave out --kv, or --shape")
    if kv is None and not components:
        kv = open_checkpoint(directory).keeps_references
    passes = make_passes(
        precision,
        text_encoder_precision,
        select(components, bool(kv), shape),
        flavour,
        opset,
        keep=keep,
        block=block,
        rotate=rotate,
        shape=Shape(*shape, _text_length(directory) if text_seq is None else text_seq) if shape else None,
        shard_size=shard_size,
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
                source = copy if _reads(target) else checkpoint
                manifest = manifest_of(root, origin, force)
                reports += _export_components(source, root, manifest, target, names, force, renew, say)
            return reports
    except OSError as error:
        place = error.filename2 or error.filename or directory
        raise ExportError(describe_os_error(error, place, "make a copy with fluxonnx export -d DIR -o COPY")) from error


def _copied_weights(passes: Sequence[tuple[Target, Sequence[str]]]) -> set[str]:
    """Return the folders whose weights a copy needs: all, but for those of graphs that have their own."""
    if len(passes) == 1:
        return set(FOLDERS.values()) if _reads(passes[0][0]) else set()
    return {FOLDERS[name] for target, names in passes for name in names if _reads(target)}


def _reads(target: Target) -> bool:
    """Whether the graphs of a copy need the checkpoint's weights in it, because they point into those files."""
    return not (target.precision.self_contained or target.precision.converts)


def _text_length(directory: str | Path) -> int:
    """Return the tokens of a prompt with its padding that a model's maker chose, else the most there are."""
    manifest = read_manifest(Path(directory))
    return (manifest.defaults if manifest else {}).get("max_sequence_length", MAX_SEQUENCE_LENGTH)


def _check_shape(shape: Shape, sizes: Architecture) -> None:
    unit = sizes.vae.scale_factor
    for name, side in (("width", shape.width), ("height", shape.height)):
        if side < unit or side % unit or side // unit >= POSITION_BASE**2:
            raise UsageError(f"--shape: {name} {side} can't be drawn: choose a multiple of {unit}, such as 512x512")


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
    precision, flavour, shape = target.precision.name, target.flavour, target.shape
    if shape:
        _check_shape(shape, sizes)
    name = build_name(precision, flavour, shape)
    build = recorded = manifest.builds.get(name)
    settings, replaced = target.settings(), replaced_parts(checkpoint)
    if build is None or (build.opset, without_parts(build.settings)) != (target.opset, settings):
        # Graphs of another opset or other settings are never mixed into one build.
        build = manifest.builds[name] = Build(precision, flavour, target.opset, settings)
    withdrawn = recorded is not None and recorded is not build

    usable = {} if force else build.components
    current = {key: c for key, c in usable.items() if is_as_made(root, checkpoint, c, manifest)}
    for component in FOLDERS:
        if build.settings.get(component) != replaced.get(component):
            current.pop(component, None)
    pending = [component for component in names if component not in current]
    # Whatever can be wrong with the checkpoint is found before anything is written.
    prepared: dict[str, Prepared] = {}
    graphs = {component: _build_graph(checkpoint, root, component, sizes, target, prepared) for component in pending}
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
            metadata = metadata_of(checkpoint, component, target, sizes)
            refuse_foreign(root / graph_file(component, precision, flavour, shape), metadata, renew)
    if pending:
        probe(root / FILE_NAME)
    known = set() if force else known_files(root, checkpoint, manifest)
    reports = []
    for component in names:
        file = graph_file(component, precision, flavour, shape)
        if component not in pending:
            found = current[component]
            reports.append(Report(component, file, found.nodes, found.parameters, 0, None))
            continue
        start, before = time.perf_counter(), recorded.components.get(component) if recorded else None
        say(component, 0, 0)
        if withdraw(build, component, replaced) or withdrawn:
            manifest.save(root)
            withdrawn = False
        sharing = current.get(KV_COMPONENTS.get(component, ""))
        shared = weights.stored_in(root, sharing.weights if sharing else ())
        graph = graphs.pop(component)
        done = _write_component(checkpoint, root, component, graph, sizes, target, known, shared, force, say)
        build.components[component] = current[component] = done
        build.settings = {key: value for key, value in build.settings.items() if key != component}
        build.settings |= {key: value for key, value in replaced.items() if key == component}
        manifest.save(root)
        remove_replaced(root, manifest, before)
        seconds = time.perf_counter() - start
        reports.append(Report(component, file, done.nodes, done.parameters, done.bytes_written, seconds))
    if set(COMPONENTS) <= set(names):
        _remove_leftovers(root)
    return reports


def _listed(layers: list[str]) -> str:
    """Return the names of a few layers, and how many more there are."""
    more = f" and {len(layers) - MOST_LISTED} more" if len(layers) > MOST_LISTED else ""
    return ", ".join(layers[:MOST_LISTED]) + more


def _remove_leftovers(root: Path) -> None:
    """Remove what killed exports left, which can be copies of all weights."""
    for folder in {root, *(root / folder for folder in FOLDERS.values())}:
        for pattern in (".*.safetensors.partial", ".*.safetensors.*.tmp", ".*.onnx.*.tmp"):
            remove_leftovers(folder, pattern)


def _weight_file(component: str, target: Target) -> str:
    return weights.weight_file(component, FOLDERS[component], target.precision.file_label(target.flavour))


def _build_graph(
    checkpoint: Checkpoint,
    root: Path,
    component: str,
    sizes: Architecture,
    target: Target,
    prepared: dict[str, Prepared],
) -> Graph:
    """Build a graph; what a precision makes of weights is added to `prepared`, for other graphs of the same weights."""
    tensors: dict[str, Tensor] = {} if component == "conditioning" else checkpoint.tensors(FOLDERS[component])
    owner = KV_COMPONENTS.get(component, component)
    if owner not in prepared:
        prepared[owner] = prepare(component, sizes, target, tensors)
    metadata = metadata_of(checkpoint, component, target, sizes)
    graph = build_graph(component, sizes, target, tensors, metadata, prepared[owner])
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
    shared: Mapping[str, Tensor],
    force: bool,
    say: Progress,
) -> Component:
    precision = target.precision
    sources = sources_of(checkpoint, root, graph)
    name = _weight_file(component, target)
    settings = {**writer(), **precision.settings()} if precision.self_contained else {}
    stored = weights.place(
        graph,
        root,
        name,
        settings,
        lambda done, total: say(component, done, total),
        known,
        not force,
        target.shard_size,
        checkpoint.may_link,
        shared,
    )
    file = graph_file(component, precision.name, target.flavour, target.shape)
    with atomic_write(root / file) as temporary:
        onnx.save(graph.model, temporary)
        links.check(graph.model, temporary, file)
    config = location(checkpoint.root, checkpoint.config_path(FOLDERS[component]))
    return Component(
        graph=file,
        exporter_version=__version__,
        sources=sources,
        weights=stored.names,
        nodes=len(graph.model.graph.node),
        parameters=graph.parameters,
        self_contained=precision.self_contained or (root != checkpoint.root and not _reads(target)),
        bytes_written=(root / file).stat().st_size + stored.bytes_written,
        graph_format=GRAPH_FORMAT,
        exporter_digest=exporter_digest(),
        files={name: content_digest(root / name) for name in (file, *stored.names)},
        configs={config: config_digest(checkpoint.root / config)},
        out_layers=list(sizes.text_encoder.out_layers) if component == "text_encoder" else None,
        errors=graph.errors,
        kept=graph.kept,
        scaling=packed_scalings(weight.source for weight in graph.weights),
    )
