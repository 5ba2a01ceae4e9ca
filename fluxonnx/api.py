"""Where exporter and runtime meet: find a model, export it if need be, open it."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxonnx import __version__
from fluxonnx.auto import Choice, choose
from fluxonnx.checkpoint import Checkpoint
from fluxonnx.errors import CheckpointError
from fluxonnx.files import explain, replacing
from fluxonnx.manifest import (
    COMPONENTS,
    DEFAULT_PRECISION,
    Build,
    build_name,
    is_current,
    read_manifest,
)
from fluxonnx.runtime.providers import CPU, traits
from fluxonnx.single_file import transformer_tensors

if TYPE_CHECKING:
    from fluxonnx.runtime.pipeline import Flux
    from fluxonnx.runtime.profile import Profile
    from fluxonnx.runtime.session import Observer

SHIPPED_MODEL = "tiny-klein"
AUTO = "auto"


def find_model(path: str | Path | None = None) -> Path:
    """Return the model directory to use: `path`, else $FLUXONNX_MODEL, else ./model, else the one in the box.

    The one in the box is copied to the user's cache, because graphs are written beside the weights.

    Raises:
        CheckpointError: The package was installed without its model, or it can't be copied.
    """
    chosen = path or os.environ.get("FLUXONNX_MODEL")
    if chosen:
        return Path(chosen)
    if Path("model").is_dir():
        return Path("model")
    package = Path(__file__).parent
    shipped = next((p for p in (package / "models", package.parent / "models") if (p / SHIPPED_MODEL).is_dir()), None)
    if shipped is None:
        raise CheckpointError("no model: pass a directory with -d, or set FLUXONNX_MODEL (see models/README.md)")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    shipped /= SHIPPED_MODEL
    # A model that was trained anew under the same version is another one.
    copy = caches / "fluxonnx" / f"{__version__}-{_digest(shipped)}" / SHIPPED_MODEL
    try:
        if not copy.is_dir():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replacing(copy) as temporary:
                shutil.copytree(shipped, temporary, ignore=shutil.ignore_patterns("training", "*.png", "*.onnx"))
    except OSError as error:
        raise CheckpointError(explain(error, copy, "set XDG_CACHE_HOME, or pass a model directory with -d")) from None
    return copy


def _digest(model: Path) -> str:
    """Tell the trained weights of two models of the same sizes apart."""
    weights = (model / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    return f"{zlib.crc32(weights):08x}"


def is_shipped(model: Path) -> bool:
    """Whether `model` is the one in the box, which knows nothing but coloured shapes."""
    return model.name == SHIPPED_MODEL


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
    profile: Profile | None = None,
    observe: Observer | None = None,
) -> Flux:
    """Open a model, exporting its graphs first where they are missing or out of date.

    Args:
        path: A model directory in the Hugging Face layout of FLUX.2-klein; by default $FLUXONNX_MODEL, else ./model,
            else the small model in the box.
        precision: "bf16" (weights as the checkpoint has them), "fp32", "fp16", "int8", "int4", or "auto" for what suits
            this machine; by default bf16 on the CPU and what suits other providers, or, in a directory that holds only
            a build with files of its own, that one.
        provider: What computes, by onnxruntime's names without their ending, such as "cuda" or "coreml"; by default
            "cpu", or what "auto" chooses.
        flavour: "ort" or "portable"; by default the one that suits the provider.
        threads: Threads per operator; None for one per core.
        low_memory: Take less memory, and more time: pictures above 576x576 are encoded and decoded in tiles.
        cache_dir: A folder for prompt embeddings, so that a known prompt never loads the text encoder.
        on_export: Called with the directory if graphs have to be exported.
        on_choice: Called with the precision and the provider that "auto" chose, and the reason.
        profile: Told how long each operator took, by onnxruntime's profiler.
        observe: Called after each run of a graph with its name, inputs and outputs.

    Raises:
        UsageError: An argument has an impossible value.
        CheckpointError: The directory is incomplete, corrupt or of another kind.
        ExportError: The graphs can't be written.
    """
    from fluxonnx.runtime.pipeline import Flux
    from fluxonnx.runtime.session import SessionOptions

    options = SessionOptions(threads, profile, observe, low_memory, provider or CPU)
    checkpoint = Checkpoint(find_model(path))
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
    missing = _missing(checkpoint.root, name)
    if missing and on_export:
        on_export(checkpoint.root)
    while missing:
        _export(checkpoint.root, precision, flavour, missing)
        # Where settings follow the machine, and it is another one, the build starts anew.
        missing = _missing(checkpoint.root, name)
    manifest = read_manifest(checkpoint.root)
    assert manifest is not None
    cache = Path(cache_dir) if cache_dir else None
    return Flux(checkpoint, manifest, manifest.builds[name], options, cache)


def _only_build(checkpoint: Checkpoint, flavour: str | None, preferred: str) -> Build | None:
    """Return a complete build of a directory that has no other weights: of the flavour, or any if that is None."""
    manifest = read_manifest(checkpoint.root)
    if manifest is None or checkpoint.has_weights("transformer"):
        return None
    for name, build in sorted(manifest.builds.items(), key=lambda item: item[1].flavour != preferred):
        if flavour in (None, build.flavour) and not _missing(checkpoint.root, name):
            return build
    return None


def default_precision(checkpoint: Checkpoint, provider: str = CPU) -> str:
    """Return the precision that suits a provider: bf16 for the CPU; but int8 if that is what the weights are.

    Raises:
        CheckpointError: The transformer's weights are missing or corrupt.
    """
    quantised = any(tensor.quantisation for tensor in transformer_tensors(checkpoint).values())
    return "int8" if quantised else traits(provider).precision or DEFAULT_PRECISION


def _transformer_of(root: Path, build: Build) -> Path | None:
    """Return the file that --transformer named when a build was made."""
    if "transformer" not in build.settings:
        return None
    name = build.settings["transformer"].rpartition(" ")[0]
    sources = build.components["transformer"].sources if "transformer" in build.components else {}
    file = next((root / source for source in sources if Path(source).name == name), None)
    if file is None or not file.is_file():
        raise CheckpointError(
            f"the {build.precision} build of {root} is out of date, and {name}, which it was made from, is gone: "
            "export it again with --transformer FILE"
        )
    return file


def _export(root: Path, precision: str, flavour: str, components: list[str]) -> None:
    """Export what a build lacks, with the settings of what is there."""
    from fluxonnx.export import export

    manifest = read_manifest(root)
    stale = manifest.builds.get(build_name(precision, flavour)) if manifest else None
    settings = stale.settings if stale else {}
    export(
        root,
        precision=precision,
        flavour=flavour,
        components=components,
        keep=settings.get("keep") or None,
        block=int(settings["block"]) if "block" in settings else None,
        rotate=settings.get("rotate") == "true",
        transformer=_transformer_of(root, stale) if stale else None,
        # A stale graph is our own derived file: replacing it loses nothing.
        force=stale is not None,
    )


def _missing(root: Path, name: str) -> list[str]:
    """Return the components of a build that are not there, or were made from other weights or by another version."""
    manifest = read_manifest(root)
    build = manifest.builds.get(name) if manifest else None
    known = build.components if build else {}
    return [part for part in COMPONENTS if part not in known or not is_current(root, known[part], __version__)]
