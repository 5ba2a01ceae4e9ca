"""Which graphs are written, where to, and in an order that never leaves half of one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from fluxonnx import __version__
from fluxonnx.checkpoint import Checkpoint, Tensor, fingerprint
from fluxonnx.errors import CheckpointError, ExportError, UsageError
from fluxonnx.export import conditioning, text_encoder, transformer, vae, weights
from fluxonnx.export.graph import Graph, GraphBuilder, Target
from fluxonnx.export.precision import make_precision
from fluxonnx.export.text_encoder import TextEncoderConfig
from fluxonnx.export.transformer import TransformerConfig
from fluxonnx.export.vae import VaeConfig
from fluxonnx.files import explain, replacing
from fluxonnx.manifest import (
    COMPONENTS,
    Build,
    Component,
    Manifest,
    build_name,
    graph_file,
    is_current,
    read_manifest,
)
from fluxonnx.single_file import transformer_tensors

# Opset 23 has RMSNormalization; 17 is the oldest with LayerNormalization and all that the other runtimes load.
FLAVOURS = {"ort": 23, "portable": 17}
OPSETS = {"ort": range(17, 24), "portable": range(17, 22)}

# progress(what, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What exporting one component did; `seconds` is None for one that was up to date already."""

    component: str
    graph: str
    nodes: int
    parameters: int
    bytes_written: int
    seconds: float | None


@dataclass(frozen=True)
class Sizes:
    """The configs of all components, checked against each other."""

    text_encoder: TextEncoderConfig
    transformer: TransformerConfig
    vae: VaeConfig

    @classmethod
    def read(cls, checkpoint: Checkpoint, out_layers: tuple[int, ...] | None) -> Sizes:
        """Read the configs; raises CheckpointError if one is wrong or they do not fit together."""
        sizes = cls(
            TextEncoderConfig.read(checkpoint.config("text_encoder"), out_layers),
            TransformerConfig.read(checkpoint.config("transformer")),
            VaeConfig.read(checkpoint.config("vae")),
        )
        text_dim = len(sizes.text_encoder.out_layers) * sizes.text_encoder.hidden
        if sizes.transformer.text_dim != text_dim:
            raise CheckpointError(
                f'{checkpoint.root}: transformer "joint_attention_dim" is {sizes.transformer.text_dim}, but the text '
                f"encoder gives {text_dim}: the folders come from different models"
            )
        if sizes.transformer.in_channels != sizes.vae.patch_channels:
            raise CheckpointError(
                f'{checkpoint.root}: transformer "in_channels" is {sizes.transformer.in_channels}, but the VAE gives '
                f"{sizes.vae.patch_channels}: the folders come from different models"
            )
        return sizes


def export(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    transformer: str | Path | None = None,
    precision: str = "bf16",
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
            written beside the checkpoint's folders. The copy of an fp16, int8 or int4 build has no other weights than
            its own.
        transformer: A safetensors file to take the transformer's weights from instead, with diffusers' or the
            original's names. The integers of one that ComfyUI's tools quantised (int8_tensorwise) are kept: "int8".
        precision: "bf16" leaves the weights in the checkpoint's files as they are; "fp32" converts them; "fp16" does,
            to half the size, and computes the products of the blocks and of the autoencoder in float16, for GPUs (on
            a CPU onnxruntime makes float32 of them when it loads them); "int8" and "int4" quantise the linears of the
            blocks.
        flavour: "ort" for onnxruntime, with its fused operators; "portable" for any runtime.
        components: Which graphs, by the names of the files; all by default.
        opset: The ai.onnx opset; by default 23 for ort and 17 for portable (21 with int4).
        keep: For int8 and int4: linears in whose names this regular expression is found are not quantised.
        rotate: For int8: mix inputs by a Hadamard matrix, against outliers; a step takes a little longer.
        block: For int4: how many weights share a scale, 32, 64 (the default) or 128.
        force: Overwrite graphs that exist and differ.
        progress: Called with what is being written, bytes done and bytes in all.

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
        checkpoint = Checkpoint(directory, transformer)
        root = checkpoint.root
        if output is not None:
            copy = weights.copy_model(checkpoint, Path(output), say, not target.precision.self_contained)
            root = copy.root
            checkpoint = checkpoint if target.precision.self_contained else copy
        return [*_export_components(checkpoint, root, target, names, force, say)]
    except OSError as error:
        place = error.filename2 or error.filename or directory
        raise ExportError(explain(error, place, "make a copy with fluxonnx export -d DIR -o COPY")) from error


def make_target(
    precision: str,
    flavour: str,
    opset: int | None,
    keep: str | None = None,
    block: int | None = None,
    rotate: bool = False,
) -> Target:
    """Check what is asked for.

    Raises:
        UsageError: An unknown precision or flavour, an option the precision does not have, or an opset that the
            flavour can't have.
    """
    chosen = make_precision(precision, keep, block, rotate)
    if flavour not in FLAVOURS:
        raise UsageError(f"flavour {flavour!r} is unknown: choose one of {', '.join(FLAVOURS)}")
    lowest = max(OPSETS[flavour][0], chosen.lowest_opset(flavour))
    allowed = range(lowest, OPSETS[flavour][-1] + 1)
    opset = max(FLAVOURS[flavour], lowest) if opset is None else opset
    if opset not in allowed:
        which = f"{precision} {flavour}" if lowest > OPSETS[flavour][0] else flavour
        raise UsageError(f"opset {opset} is out of range: {which} graphs can be {allowed[0]} to {allowed[-1]}")
    return Target(chosen, flavour, opset)


def select(components: Sequence[str] | None) -> list[str]:
    """Return the components to export, in order.

    Raises:
        UsageError: One of them does not exist.
    """
    for name in components or ():
        if name not in COMPONENTS:
            raise UsageError(f"component {name!r} is unknown: choose from {', '.join(COMPONENTS)}")
    return [name for name in COMPONENTS if not components or name in components]


def build_graph(component: str, sizes: Sizes, target: Target, tensors: dict[str, Tensor], metadata: dict) -> Graph:
    """Build one component's graph and check that it uses every tensor of the checkpoint it should.

    Raises:
        CheckpointError: A tensor is missing, left over, or of the wrong shape.
    """
    g = GraphBuilder(component, target, tensors)
    unused: tuple[str, ...] = ("",)
    if component == "conditioning":
        conditioning.build(g, sizes.transformer)
    elif component == "transformer":
        transformer.build(g, sizes.transformer)
        unused = transformer.UNUSED
    elif component == "text_encoder":
        text_encoder.build(g, sizes.text_encoder)
        unused = sizes.text_encoder.unused
    elif component == "vae_encoder":
        vae.build_encoder(g, sizes.vae)
        unused = vae.UNUSED_BY_ENCODER
    else:
        vae.build_decoder(g, sizes.vae)
        unused = vae.UNUSED_BY_DECODER
    left_over = [name for name in tensors if name not in g.used and not name.startswith(unused)]
    if left_over:
        more = f" and {len(left_over) - 1} more" if len(left_over) > 1 else ""
        raise CheckpointError(
            f"{component}: tensor {left_over[0]} {list(tensors[left_over[0]].shape)}{more} is not part of the model "
            "that config.json describes: config.json and weights do not belong together"
        )
    doc = f"{component} of {metadata['model']}, exported by fluxonnx {__version__}"
    return g.finish(doc, metadata)


def _export_components(
    checkpoint: Checkpoint, root: Path, target: Target, names: list[str], force: bool, say: Progress
) -> Sequence[Report]:
    manifest = _manifest(root, force)
    out_layers = tuple(manifest.text_encoder_out_layers) if manifest.text_encoder_out_layers else None
    sizes = Sizes.read(checkpoint, out_layers)
    manifest.text_encoder_out_layers = list(sizes.text_encoder.out_layers)
    manifest.architecture = asdict(sizes)
    precision, flavour = target.precision.name, target.flavour
    name = build_name(precision, flavour)
    build = manifest.builds.get(name)
    settings = target.precision.settings() | _transformer(checkpoint)
    if build is None or (build.opset, build.settings) != (target.opset, settings):
        # Graphs of another opset or other settings are never mixed into one build.
        build = manifest.builds[name] = Build(precision, flavour, target.opset, settings)

    current = (
        {} if force else {key: done for key, done in build.components.items() if is_current(root, done, __version__)}
    )
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
    """Refuse to overwrite a graph, except ours of the same settings: left by a killed export or an older version."""
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
    checkpoint: Checkpoint, root: Path, component: str, sizes: Sizes, target: Target, say: Progress
) -> Component:
    folder, precision = COMPONENTS[component], target.precision
    say(component, 0, 0)
    tensors: dict[str, Tensor] = {}
    if component == "transformer":
        tensors = transformer_tensors(checkpoint)
    elif component != "conditioning":
        tensors = checkpoint.tensors(folder)
    graph = build_graph(component, sizes, target, tensors, _metadata(checkpoint, component, target, sizes))
    # What is made of a checkpoint elsewhere can't go stale with it.
    sources = sorted({weight.source.file for weight in graph.weights}) if root == checkpoint.root else []
    name = weights.weight_file(component, folder, precision.file_label(target.flavour))
    settings = {"version": __version__, **precision.settings()} if precision.self_contained else {}
    stored = weights.place(graph, root, name, settings, lambda a, b: say(component, a, b))
    file = graph_file(component, target.precision.name, target.flavour)
    with replacing(root / file) as temporary:
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
    )


def _location(root: Path, path: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _transformer(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what tells a build with this transformer from one with the checkpoint's own."""
    file = checkpoint.transformer
    return {"transformer": f"{file.name} {fingerprint(file)[:12]}"} if file else {}


def _metadata(checkpoint: Checkpoint, component: str, target: Target, sizes: Sizes) -> dict[str, str]:
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
        "architecture": json.dumps(asdict(getattr(sizes, COMPONENTS[component]))),
    }
