"""Where exporter and runtime meet: find a model, export it if needed, open it."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxonnx.auto import Choice, choose
from fluxonnx.checkpoint import hub
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.formats import native_precision
from fluxonnx.checkpoint.manifest import (
    DEFAULT_FLAVOUR,
    DEFAULT_PRECISION,
    Build,
    Component,
    Manifest,
    build_name,
    changed_config,
    fault,
    is_current,
    read_manifest,
)
from fluxonnx.contract import COMPONENTS, GRAPH_FORMAT, OLDEST_RUNNABLE_FORMAT, open_checkpoint
from fluxonnx.errors import CheckpointError, ExportError
from fluxonnx.files import atomic_folder, atomic_write, describe_os_error, exclusive, require_text
from fluxonnx.runtime.engine import Engine, SessionOptions
from fluxonnx.runtime.events import Watch
from fluxonnx.runtime.providers import CPU, traits
from fluxonnx.version import __version__

if TYPE_CHECKING:
    from fluxonnx.runtime.pipeline import Flux

DEMO_MODEL = "tiny-klein"
AUTO = "auto"
# The graph that may be of another build, and the others.
ENCODER = "text_encoder"
WITHOUT_ENCODER = tuple(name for name in COMPONENTS if name != ENCODER)

# Exports in a row after which a build should be up to date: one more than with the settings of another machine.
MOST_EXPORTS = 3


def find_model(path: str | Path | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Return the model directory to use: `path`, else $FLUXONNX_MODEL, else ./model, else the bundled demo model.

    The demo model is copied to the user's cache, because graphs are written beside the weights. A name OWNER/NAME that
    is no folder here is a repository of the Hugging Face hub: what is missing of it is downloaded, of which `say` is
    told.

    Raises:
        CheckpointError: The package was installed without its model, or the model can't be copied.
    """
    chosen = path or os.environ.get("FLUXONNX_MODEL")
    if chosen:
        return hub.download(str(chosen), say=say) if hub.is_repository(chosen) else Path(chosen)
    if Path("model").is_dir():
        return Path("model")
    package = Path(__file__).parent
    bundled = next((p for p in (package / "models", package.parent / "models") if (p / DEMO_MODEL).is_dir()), None)
    if bundled is None:
        raise CheckpointError("no model: pass a directory with -d, or set FLUXONNX_MODEL (see models/README.md)")
    bundled /= DEMO_MODEL
    # The digest tells models apart that were trained under the same version.
    copy = _caches() / "fluxonnx" / f"{__version__}-{_digest(bundled)}" / DEMO_MODEL
    try:
        if _lacking(bundled, copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(copy.parent):
                _copy_demo(bundled, copy)
    except OSError as error:
        cure = "set XDG_CACHE_HOME, or pass a model directory with -d"
        raise CheckpointError(describe_os_error(error, copy, cure)) from None
    return copy


def _lacking(bundled: Path, copy: Path) -> list[Path]:
    """Return the files of the demo model that its copy lacks, all or those that a cleaner of caches has removed."""
    files = [
        file.relative_to(bundled)
        for file in bundled.rglob("*")
        if file.is_file() and file.suffix not in (".png", ".onnx") and bundled / "training" not in file.parents
    ]
    return [name for name in files if not (copy / name).is_file()]


def _copy_demo(bundled: Path, copy: Path) -> None:
    # Not `copytree`, which hides why a file can't be copied, and makes the copy of a read-only package read-only, too.
    if not copy.is_dir():
        with atomic_folder(copy) as temporary:
            for name in _lacking(bundled, temporary):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundled / name, temporary / name)
    for name in _lacking(bundled, copy):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(copy / name) as whole:
            shutil.copyfile(bundled / name, whole)


def _caches() -> Path:
    """Return the user's folder for caches.

    Raises:
        CheckpointError: There is none.
    """
    if found := os.environ.get("XDG_CACHE_HOME"):
        return Path(found)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        raise CheckpointError(
            "no home directory for the copy of the demo model: set HOME or XDG_CACHE_HOME, or pass a model with -d"
        ) from None


def _digest(model: Path) -> str:
    weights = (model / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    return f"{zlib.crc32(weights):08x}"


def is_shipped(model: Path) -> bool:
    """Whether `model` is the bundled demo model, which knows nothing but coloured shapes."""
    return model.name == DEMO_MODEL


def load(
    path: str | Path | None = None,
    *,
    transformer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    precision: str | None = None,
    text_encoder_precision: str | None = None,
    provider: str | None = None,
    flavour: str | None = None,
    threads: int | None = None,
    low_memory: bool = False,
    cache_dir: str | Path | None = None,
    on_export: Callable[[Path], None] | None = None,
    on_choice: Callable[[Choice], None] | None = None,
    watch: Watch | None = None,
    profile: bool = False,
    engine: Engine | None = None,
) -> Flux:
    """Open a model, exporting its graphs first where they are missing or out of date.

    Args:
        path: A model directory in the Hugging Face layout of FLUX.2-klein; by default $FLUXONNX_MODEL, else ./model,
            else the bundled demo model.
        transformer: A file, or the folder of one, that replaces the transformer's weights; see `export`. The build of
            the precision is exported again if its weights come from elsewhere, and stays with these.
        text_encoder: Likewise for the text encoder.
        vae: Likewise for the autoencoder.
        precision: "bf16" (weights as the checkpoint has them), "fp32", "fp16", "int8", "int4", or "auto" for what suits
            this machine; by default bf16 on the CPU and what suits other providers. In a directory that holds only a
            self-contained build, it is that build's.
        text_encoder_precision: The precision of the text encoder, by default as `precision`: the text encoder of one
            build is used beside the other graphs of another.
        provider: The execution provider, by onnxruntime's names without their ending, such as "cuda" or "coreml"; by
            default "cpu", or what "auto" chooses.
        flavour: "ort" or "portable"; by default the one that suits the provider.
        threads: Threads per operator; None for one per core that this process may use.
        low_memory: Use less memory, and more time: pictures above 576x576 are encoded and decoded in tiles.
        cache_dir: A folder for prompt embeddings, so that a known prompt never loads the text encoder.
        on_export: Called with the directory if graphs have to be exported.
        on_choice: Called with the precision and the provider that "auto" chose, and the reason.
        watch: Called with each event inside a run: phases, graphs that ran, times of operators; see `runtime.events`.
        profile: Run under onnxruntime's profiler, which costs time: `watch` is told the times of operators.
        engine: Opens graphs in another engine than onnxruntime; see `runtime.engine`.

    Raises:
        UsageError: An argument has an impossible value.
        CheckpointError: The directory is incomplete, corrupt or of another kind.
        ExportError: The graphs can't be written.
    """
    from fluxonnx.runtime.pipeline import Flux

    options = SessionOptions(
        threads=threads, low_memory=low_memory, provider=provider or CPU, watch=watch, profile=profile, engine=engine
    )
    model = find_model(path)
    try:
        checkpoint = open_checkpoint(model, transformer, text_encoder=text_encoder, vae=vae)
        require_text(checkpoint.root)
        if precision is None or precision == AUTO:
            build = _only_build(checkpoint, flavour, traits(options.provider).flavour)
            if build:
                precision, flavour = build.precision, build.flavour
            elif precision == AUTO:
                choice = choose(checkpoint, provider)
                precision, options = choice.precision, replace(options, provider=choice.provider)
                if on_choice:
                    on_choice(choice)
        precision = precision or default_precision(checkpoint, options.provider)
        flavour = flavour or traits(options.provider).flavour
        cache = Path(cache_dir) if cache_dir else None
        name = build_name(precision, flavour)
        if checkpoint.parts:
            _export_parts(checkpoint, precision, text_encoder_precision, flavour, on_export)
        text_encoder_precision = text_encoder_precision or _other_encoder(checkpoint, name)
        if text_encoder_precision in (None, precision):
            manifest = _up_to_date(checkpoint, precision, flavour, on_export)
            return Flux(checkpoint, manifest, manifest.builds[name], options, cache)
        # First, because it is the smaller part of what may be wrong.
        _up_to_date(checkpoint, text_encoder_precision, flavour, on_export, [ENCODER])
        manifest = _up_to_date(checkpoint, precision, flavour, on_export, WITHOUT_ENCODER)
        encoder = manifest.builds[build_name(text_encoder_precision, flavour)]
        return Flux(checkpoint, manifest, manifest.builds[name], options, cache, encoder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or model} can't be read: {error.strerror or error}") from None


def _export_parts(
    checkpoint: Checkpoint,
    precision: str,
    text_encoder_precision: str | None,
    flavour: str,
    on_export: Callable[[Path], None] | None,
) -> None:
    """Export what is not yet made from the files that replace weights; whatever is, is left alone."""
    from fluxonnx.export import export

    if on_export:
        on_export(checkpoint.root)
    export(
        checkpoint.root,
        transformer=checkpoint.parts.get("transformer"),
        text_encoder=checkpoint.parts.get("text_encoder"),
        vae=checkpoint.parts.get("vae"),
        precision=precision,
        text_encoder_precision=text_encoder_precision,
        flavour=flavour,
        renew=True,
    )


def _up_to_date(
    checkpoint: Checkpoint,
    precision: str,
    flavour: str,
    on_export: Callable[[Path], None] | None,
    parts: Sequence[str] = tuple(COMPONENTS),
) -> Manifest:
    """Return the manifest with a build of whose parts none is missing or out of date, after exporting those."""
    name, root = build_name(precision, flavour), checkpoint.root
    manifest, missing = _to_export(checkpoint, name, parts)
    if not missing:
        return manifest
    if on_export:
        on_export(root)
    with exclusive(root):
        # Another process may have exported it meanwhile. Some settings depend on the machine: on another one the build
        # starts anew.
        for _ in range(MOST_EXPORTS):
            manifest, missing = _to_export(checkpoint, name, parts)
            if not missing:
                return manifest
            _export(root, manifest, precision, flavour, missing)
    raise ExportError(f"the files of {root} change while they are exported: close what writes them, and run it again")


def default_precision(checkpoint: Checkpoint, provider: str = CPU) -> str:
    """Return the precision that suits a provider: bf16 for the CPU; but int8 where the checkpoint's weights are.

    Raises:
        CheckpointError: The transformer's weights are missing or corrupt.
    """
    return native_precision(checkpoint.tensors("transformer")) or traits(provider).precision or DEFAULT_PRECISION


def _only_build(checkpoint: Checkpoint, flavour: str | None, preferred: str) -> Build | None:
    """Return the build of a directory that has no other weights: of the flavour, or any if that is None.

    One that can be run is preferred; of another one, opening it says what is wrong.
    """
    manifest = read_manifest(checkpoint.root)
    if manifest is None or checkpoint.has_weights("transformer"):
        return None
    root, layers = checkpoint.root, manifest.text_encoder_out_layers
    damaged = None
    for name, build in sorted(manifest.builds.items(), key=lambda item: item[1].flavour != preferred):
        if flavour in (None, build.flavour):
            parts = WITHOUT_ENCODER if _other_encoder(checkpoint, name) else COMPONENTS
            if not any(_unusable(root, build.components.get(part), part, layers) for part in parts):
                return build
            if build.components and all(component.self_contained for component in build.components.values()):
                damaged = damaged or build
    return damaged


def _other_encoder(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the precision of another build whose text encoder belongs to a build that has none; None if there is none.

    A self-contained copy of such a pair of builds lacks the weights that one of them was made from.
    """
    manifest = read_manifest(checkpoint.root)
    build = manifest.builds.get(name) if manifest else None
    if manifest is None or build is None or ENCODER in build.components:
        return None
    if all(map(checkpoint.has_weights, (ENCODER, "transformer"))):
        return None
    root, layers = checkpoint.root, manifest.text_encoder_out_layers
    for other in manifest.builds.values():
        if other.flavour == build.flavour and not _unusable(root, other.components.get(ENCODER), ENCODER, layers):
            return other.precision
    return None


def _to_export(checkpoint: Checkpoint, name: str, parts: Sequence[str]) -> tuple[Manifest, list[str]]:
    """Return the manifest, and those of some components of a build that have to be exported.

    They are missing or damaged, of other weights or configs, or of an older format.

    A self-contained build of an older format stays in use where it can't be exported again.

    Raises:
        CheckpointError: A component has to be exported, but what it is made from is not here.
    """
    root = checkpoint.root
    manifest = read_manifest(root) or Manifest()
    build = manifest.builds.get(name)
    known = build.components if build else {}
    layers = manifest.text_encoder_out_layers
    stale = [p for p in parts if p not in known or not is_current(root, known[p], GRAPH_FORMAT, layers)]
    if build is None:
        return manifest, stale
    reasons = {part: reason for part in stale if (reason := _not_exportable(checkpoint, build, part))}
    unusable = {part: why for part in stale if (why := _unusable(root, known.get(part), part, layers))}
    if reasons and not unusable:
        return manifest, []  # never a part of it: a build has one format, and one set of settings
    for part, reason in reasons.items():
        if part in unusable:
            raise CheckpointError(f"the {name} build of {root} {unusable[part]}, and {reason}: {_cure(root, build)}")
    return manifest, stale


def _unusable(root: Path, component: Component | None, part: str, out_layers: list[int] | None) -> str | None:
    """Return why a graph can't be run as it is, current or not; None if it can."""
    if component is None:
        return f"has no {part} graph"
    if component.graph_format < OLDEST_RUNNABLE_FORMAT:
        return "is of a format that can't be run any more"
    if found := fault(root, component):
        return f"is not whole ({found})"
    config = changed_config(root, component, out_layers)
    return f"is out of date ({config} has changed)" if config else None


def _cure(root: Path, build: Build) -> str:
    """Return what makes a build again that can't be exported from its own directory."""
    flavour = f" --flavour {build.flavour}" if build.flavour != DEFAULT_FLAVOUR else ""
    what = f"--precision {build.precision}{flavour}"
    if parts := build.parsed_settings.parts:
        flags = " ".join(sorted({f"--{COMPONENTS[name].replace('_', '-')} FILE" for name in parts}))
        return f"make it again with fluxonnx export -d {root} {what} {flags}"
    return f"make it again with fluxonnx export -d CHECKPOINT -o {root} {what}"


def _not_exportable(checkpoint: Checkpoint, build: Build, part: str) -> str | None:
    """Return why a component can't be exported here; None if it can."""
    folder = COMPONENTS[part]
    # without the graph, the setting is of an export that never ended
    replaced = build.parsed_settings.parts.get(part) if part in build.components else None
    if replaced:
        return None if _replacement(checkpoint.root, build, part) else f"{replaced}, which it was made from, is gone"
    if part == "conditioning" or checkpoint.has_weights(folder):
        return None
    return f"{checkpoint.root / folder} holds no weights to make it from"


def _replacement(root: Path, build: Build, part: str) -> Path | None:
    """Return the file, or index of files, that a graph's weights came from instead of the directory's, if it is there.

    It is one of the sources, or lies beside them.
    """
    sources = build.components[part].sources if part in build.components else {}
    name = build.parsed_settings.parts.get(part)
    if name is None:
        return None
    return next((file for source in sources if (file := (root / source).with_name(name)).is_file()), None)


def _export(root: Path, manifest: Manifest, precision: str, flavour: str, components: list[str]) -> None:
    """Export the components that a build lacks, with the settings of the build."""
    from fluxonnx.export import export

    stale = manifest.builds.get(build_name(precision, flavour))
    if stale is None:
        export(root, precision=precision, flavour=flavour, components=components, renew=True)
        return
    settings = stale.parsed_settings
    export(
        root,
        precision=precision,
        flavour=flavour,
        components=components,
        keep=settings.keep,
        block=settings.block,
        rotate=settings.rotate,
        transformer=_replacement(root, stale, "transformer"),
        text_encoder=_replacement(root, stale, "text_encoder"),
        vae=_replacement(root, stale, "vae_encoder") or _replacement(root, stale, "vae_decoder"),
        # A stale graph is derived from other files: overwriting it loses nothing.
        renew=True,
    )
