"""Where exporter and runtime meet: find a model, export it if needed, open it."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxonnx.auto import Choice, choose
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import (
    DEFAULT_FLAVOUR,
    DEFAULT_PRECISION,
    Build,
    Component,
    build_name,
    is_current,
    is_usable,
    read_manifest,
)
from fluxonnx.contract import COMPONENTS, GRAPH_FORMAT, OLDEST_RUNNABLE_FORMAT, open_checkpoint
from fluxonnx.errors import CheckpointError
from fluxonnx.files import atomic_write, describe_os_error
from fluxonnx.runtime.engine import Engine, SessionOptions
from fluxonnx.runtime.events import Watch
from fluxonnx.runtime.providers import CPU, traits
from fluxonnx.version import __version__

if TYPE_CHECKING:
    from fluxonnx.runtime.pipeline import Flux

DEMO_MODEL = "tiny-klein"
AUTO = "auto"


def find_model(path: str | Path | None = None) -> Path:
    """Return the model directory to use: `path`, else $FLUXONNX_MODEL, else ./model, else the bundled demo model.

    The demo model is copied to the user's cache, because graphs are written beside the weights.

    Raises:
        CheckpointError: The package was installed without its model, or the model can't be copied.
    """
    chosen = path or os.environ.get("FLUXONNX_MODEL")
    if chosen:
        return Path(chosen)
    if Path("model").is_dir():
        return Path("model")
    package = Path(__file__).parent
    bundled = next((p for p in (package / "models", package.parent / "models") if (p / DEMO_MODEL).is_dir()), None)
    if bundled is None:
        raise CheckpointError("no model: pass a directory with -d, or set FLUXONNX_MODEL (see models/README.md)")
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise CheckpointError(
            "HOME is not set, so there is no place for the demo model: set HOME or XDG_CACHE_HOME, or pass a model "
            "directory with -d"
        ) from None
    bundled /= DEMO_MODEL
    # The digest tells models apart that were trained under the same version.
    copy = caches / "fluxonnx" / f"{__version__}-{_digest(bundled)}" / DEMO_MODEL
    try:
        if not copy.is_dir():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(copy) as temporary:
                shutil.copytree(bundled, temporary, ignore=shutil.ignore_patterns("training", "*.png", "*.onnx"))
    except OSError as error:
        cure = "set XDG_CACHE_HOME, or pass a model directory with -d"
        raise CheckpointError(describe_os_error(error, copy, cure)) from None
    return copy


def _digest(model: Path) -> str:
    weights = (model / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    return f"{zlib.crc32(weights):08x}"


def is_shipped(model: Path) -> bool:
    """Whether `model` is the bundled demo model, which knows nothing but coloured shapes."""
    return model.name == DEMO_MODEL


def load(
    path: str | Path | None = None,
    *,
    precision: str | None = None,
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
        precision: "bf16" (weights as the checkpoint has them), "fp32", "fp16", "int8", "int4", or "auto" for what suits
            this machine; by default bf16 on the CPU and what suits other providers. In a directory that holds only a
            self-contained build, it is that build's.
        provider: The execution provider, by onnxruntime's names without their ending, such as "cuda" or "coreml"; by
            default "cpu", or what "auto" chooses.
        flavour: "ort" or "portable"; by default the one that suits the provider.
        threads: Threads per operator; None for one per core.
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
    checkpoint = open_checkpoint(find_model(path))
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
    name = build_name(precision, flavour)
    missing = _to_export(checkpoint, name)
    if missing and on_export:
        on_export(checkpoint.root)
    while missing:
        _export(checkpoint.root, precision, flavour, missing)
        # Some settings depend on the machine: on another one the build starts anew.
        missing = _to_export(checkpoint, name)
    manifest = read_manifest(checkpoint.root)
    assert manifest is not None
    cache = Path(cache_dir) if cache_dir else None
    return Flux(checkpoint, manifest, manifest.builds[name], options, cache)


def default_precision(checkpoint: Checkpoint, provider: str = CPU) -> str:
    """Return the precision that suits a provider: bf16 for the CPU; but int8 where the checkpoint's weights are.

    Raises:
        CheckpointError: The transformer's weights are missing or corrupt.
    """
    quantised = any(tensor.quantisation for tensor in checkpoint.tensors("transformer").values())
    return "int8" if quantised else traits(provider).precision or DEFAULT_PRECISION


def _only_build(checkpoint: Checkpoint, flavour: str | None, preferred: str) -> Build | None:
    """Return a usable build of a directory that has no other weights: of the flavour, or any if that is None."""
    manifest = read_manifest(checkpoint.root)
    if manifest is None or checkpoint.has_weights("transformer"):
        return None
    for build in sorted(manifest.builds.values(), key=lambda build: build.flavour != preferred):
        if flavour in (None, build.flavour) and all(
            name in build.components and _runs(checkpoint.root, build.components[name]) for name in COMPONENTS
        ):
            return build
    return None


def _runs(root: Path, component: Component) -> bool:
    """Whether a graph can be run as it is, current or not."""
    return component.graph_format >= OLDEST_RUNNABLE_FORMAT and is_usable(root, component)


def _to_export(checkpoint: Checkpoint, name: str) -> list[str]:
    """Return the components of a build that have to be exported: missing, of other weights, or of an older format.

    A self-contained build of an older format stays in use where it can't be exported again.

    Raises:
        CheckpointError: A component has to be exported, but what it is made from is not here.
    """
    root = checkpoint.root
    manifest = read_manifest(root)
    build = manifest.builds.get(name) if manifest else None
    known = build.components if build else {}
    stale = [part for part in COMPONENTS if part not in known or not is_current(root, known[part], GRAPH_FORMAT)]
    if build is None:
        return stale
    reasons = {part: reason for part in stale if (reason := _not_exportable(checkpoint, build, part))}
    unusable = [part for part in stale if part not in known or not _runs(root, known[part])]
    if reasons and not unusable:
        return []  # never a part of it: a build has one format, and one set of settings
    for part, reason in reasons.items():
        if part in unusable:
            state = "is out of date" if part in known else f"has no {part} graph"
            raise CheckpointError(f"the {name} build of {root} {state}, and {reason}: {_cure(root, build)}")
    return stale


def _cure(root: Path, build: Build) -> str:
    """Return what makes a build again that can't be exported from its own directory."""
    flavour = f" --flavour {build.flavour}" if build.flavour != DEFAULT_FLAVOUR else ""
    what = f"--precision {build.precision}{flavour}"
    if build.parsed_settings.transformer:
        return f"make it again with fluxonnx export -d {root} {what} --transformer FILE"
    return f"make it again with fluxonnx export -d CHECKPOINT -o {root} {what}"


def _not_exportable(checkpoint: Checkpoint, build: Build, part: str) -> str | None:
    """Return why a component can't be exported here; None if it can."""
    folder, replaced = COMPONENTS[part], build.parsed_settings.transformer
    if part == "transformer" and replaced:
        return None if _replacement(checkpoint.root, build) else f"{replaced}, which it was made from, is gone"
    if part == "conditioning" or checkpoint.has_weights(folder):
        return None
    return f"{checkpoint.root / folder} holds no weights to make it from"


def _replacement(root: Path, build: Build) -> Path | None:
    """Return the file that --transformer named when a build was made, if it is still there."""
    sources = build.components["transformer"].sources if "transformer" in build.components else {}
    name = build.parsed_settings.transformer
    return next((root / source for source in sources if Path(source).name == name and (root / source).is_file()), None)


def _export(root: Path, precision: str, flavour: str, components: list[str]) -> None:
    """Export the components that a build lacks, with the settings of the build."""
    from fluxonnx.export import export

    manifest = read_manifest(root)
    stale = manifest.builds.get(build_name(precision, flavour)) if manifest else None
    if stale is None:
        export(root, precision=precision, flavour=flavour, components=components)
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
        transformer=_replacement(root, stale),
        # A stale graph is derived from other files: overwriting it loses nothing.
        force=True,
    )
