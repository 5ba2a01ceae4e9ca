"""What is recorded of an export: in the manifest while it runs, in graphs, and in the headers of weight files."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import onnx

from fluxonnx.checkpoint.digests import content_digest
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import (
    FILE_NAME,
    Build,
    Component,
    Manifest,
    are_as_recorded,
    exporter_digest,
    is_current,
    is_source_checkout,
    read_manifest,
    salvaged_manifest,
)
from fluxonnx.checkpoint.reading import check_readable, exists, is_file
from fluxonnx.contract import GRAPH_FORMAT, Architecture
from fluxonnx.errors import CheckpointError, ExportError
from fluxonnx.export.components import Target
from fluxonnx.export.graph import Graph
from fluxonnx.export.parts import as_text, stated
from fluxonnx.version import __version__


def is_as_made(root: Path, checkpoint: Checkpoint, component: Component, manifest: Manifest) -> bool:
    """Whether a graph is current, and of the weights that a checkpoint, here or elsewhere, has now."""
    current = is_current(root, component, GRAPH_FORMAT, manifest.text_encoder_out_layers)
    return current and are_as_recorded(checkpoint.root, component)


def known_files(root: Path, checkpoint: Checkpoint, manifest: Manifest) -> set[str]:
    """Return the weight files of all builds that are as they were written, from the checkpoint as it is now."""
    return {
        name
        for build in manifest.builds.values()
        for component in build.components.values()
        if component.files and is_as_made(root, checkpoint, component, manifest)
        for name in component.weights
    }


def withdraw(build: Build, component: str, replaced: dict[str, str]) -> bool:
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


def manifest_of(root: Path, origin: Path, force: bool) -> Manifest:
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


def refuse_foreign(path: Path, metadata: dict[str, str], renew: bool) -> None:
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


def sources_of(checkpoint: Checkpoint, root: Path, graph: Graph) -> dict[str, str]:
    """Return the digests of the files that a graph is made from.

    A copy does not depend on them; but if it is made again, it must show whether the checkpoint is the same.
    """
    files = sorted({weight.source.file for weight in graph.weights})
    if root != checkpoint.root:
        files = [file for file in files if file.is_relative_to(checkpoint.root)]
    return {location(checkpoint.root, path): content_digest(path) for path in files}


def writer() -> dict[str, str]:
    """Return what in the header of a weight file tells it from one that another exporter made of the same weights."""
    return {"graph_format": str(GRAPH_FORMAT), **({"exporter": exporter_digest()} if is_source_checkout() else {})}


def location(root: Path, path: Path) -> str:
    """Return how a manifest names a file: relative to the folder, if it is in there."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def metadata_of(checkpoint: Checkpoint, component: str, target: Target, sizes: Architecture) -> dict[str, str]:
    """Return what a graph says about itself."""
    return {
        "producer": "fluxonnx",
        "version": __version__,
        "model": as_text(checkpoint.name),
        "component": component,
        "precision": target.precision.name,
        "flavour": target.flavour,
        "opset": str(target.opset),
        **target.settings(),
        **stated(checkpoint, component),
        "architecture": sizes.component_json(component),
    }


def remove_replaced(root: Path, manifest: Manifest, before: Component | None) -> None:
    """Remove the weight files of a graph that was exported again, if no build uses them any more.

    Files that are not as they were written stay: they may be somebody's.
    """
    if before is None:
        return
    builds = manifest.builds.values()
    used = {name for build in builds for component in build.components.values() for name in component.weights}
    for name in before.weights:
        file = root / name
        if name not in used and name in before.files and is_file(file) and content_digest(file) == before.files[name]:
            file.unlink()
