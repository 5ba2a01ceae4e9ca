"""Where exporter and runtime meet: find a model, export it if needed, open it."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxonnx.auto import (
    ENCODER,
    WITHOUT_ENCODER,
    Choice,
    choose,
    default_precision,
    encoder_beside,
    fastest_provider,
    held_build,
    static_builds,
    unsuited,
    unusable,
)
from fluxonnx.checkpoint import hub
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import (
    NOT_AS_EXPORTED,
    Build,
    Manifest,
    build_name,
    fault,
    is_current,
    read_manifest,
)
from fluxonnx.contract import COMPONENTS, FOLDERS, GRAPH_FORMAT, KV_COMPONENTS, open_checkpoint
from fluxonnx.errors import CheckpointError, ExportError
from fluxonnx.files import atomic_folder, atomic_write, describe_os_error, exclusive, require_text, user_caches
from fluxonnx.runtime.engine import Engine, SessionOptions
from fluxonnx.runtime.events import Watch
from fluxonnx.runtime.notices import warn
from fluxonnx.runtime.providers import CPU, traits
from fluxonnx.version import __version__

if TYPE_CHECKING:
    from fluxonnx.runtime.pipeline import Flux

DEMO_MODEL = "tiny-klein"
AUTO = "auto"
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
    found = user_caches()
    if found is None:
        raise CheckpointError(
            "no home directory for the copy of the demo model: set HOME or XDG_CACHE_HOME, or pass a model with -d"
        )
    return found


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
    provider_options: Mapping[str, str] | None = None,
    flavour: str | None = None,
    kv: bool | None = None,
    threads: int | None = None,
    low_memory: bool = False,
    keep_loaded: bool = False,
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
            this machine; by default that of the build that the directory holds (see `auto.held_build` for the order of
            several), and in one without builds bf16 on the CPU and what suits other providers. Nothing is exported
            into a directory with a build that works unless this or `flavour` asks for another one.
        text_encoder_precision: That of the text encoder, by default the same; else another build's encoder is used.
        provider: The execution provider, by onnxruntime's names without their ending, such as "cuda" or "coreml"; by
            default "cpu", or what the precision "auto" chooses. "auto" for a GPU's where it works, else the CPU's.
        provider_options: Options of the provider, by the names that its documentation has; see docs/providers.md.
        flavour: "ort" or "portable"; by default likewise, or the one that suits the provider.
        kv: Whether the graphs for `Request.kv` are needed; None for what the model was made for.
        threads: Threads per operator; None for one per core that this process may use.
        low_memory: Use less memory, and more time: pictures above 576x576 are encoded and decoded in tiles.
        keep_loaded: Keep all graphs loaded between pictures; by default each is freed as soon as it has run.
        cache_dir: A folder for prompt embeddings, so that a known prompt never loads the text encoder.
        on_export: Called with the directory if graphs have to be exported.
        on_choice: Called with the precision and provider that "auto" chose, or of a build that was there, and why.
        watch: Called with each event inside a run: phases, graphs that ran, times of operators; see `runtime.events`.
        profile: Run under onnxruntime's profiler, which costs time: `watch` is told the times of operators.
        engine: Opens graphs in another engine than onnxruntime; see `runtime.engine`.

    Raises:
        UsageError: An argument has an impossible value.
        CheckpointError: The directory is incomplete, corrupt or of another kind.
        ExportError: The graphs can't be written.
    """
    from fluxonnx.runtime.pipeline import Flux

    why = None
    if provider == AUTO:
        provider, why = fastest_provider()
    options = SessionOptions(
        threads=threads,
        low_memory=low_memory,
        keep_loaded=keep_loaded,
        provider=provider or CPU,
        provider_options=dict(provider_options or {}),
        watch=watch,
        profile=profile,
        engine=engine,
    )
    model = find_model(path)
    try:
        checkpoint = open_checkpoint(model, transformer, text_encoder=text_encoder, vae=vae)
        require_text(checkpoint.root)
        held, choice = None, None
        if not checkpoint.parts and (precision is None or not checkpoint.has_weights("transformer")):
            asked = None if precision == AUTO else precision
            held = held_build(checkpoint, options.provider, asked, flavour, text_encoder_precision is not None)
        if held:
            precision, flavour = held.build.precision, held.build.flavour
            text_encoder_precision = text_encoder_precision or held.encoder
            choice = _unusual(checkpoint, held.build, options.provider)
        elif precision == AUTO:
            choice = choose(checkpoint, provider)
            precision, options = choice.precision, replace(options, provider=choice.provider)
        precision = precision or default_precision(checkpoint, options.provider)
        if why:
            choice = Choice(precision, options.provider, "; ".join([why, *([choice.reason] if choice else [])]))
        if choice and on_choice:
            on_choice(choice)
        flavour = flavour or traits(options.provider).flavour
        cache = Path(cache_dir) if cache_dir else None
        name = build_name(precision, flavour)
        usual = checkpoint.keeps_references and checkpoint.has_weights("transformer")
        optional = tuple(KV_COMPONENTS) if (usual if kv is None else kv) else ()
        if checkpoint.parts:
            _export_parts(checkpoint, precision, text_encoder_precision, flavour, kv, on_export)
        text_encoder_precision = text_encoder_precision or _other_encoder(checkpoint, name)
        if text_encoder_precision in (None, precision):
            static, broken = static_builds(checkpoint, precision, flavour)
            for unused, reason in broken:
                again = f"make it again with fluxonnx export -d {checkpoint.root} {unused.flags} --force"
                warn(f"the static build {unused.name} of {checkpoint.root} is not used (it {reason}): {again}")
            if mismatch := unsuited(checkpoint, (static or [Build(precision, flavour, 0)])[0], options.provider):
                warn(mismatch)
            if static and name not in (read_manifest(checkpoint.root) or Manifest()).builds:
                manifest = _up_to_date(checkpoint, static[0], on_export)
                return Flux(checkpoint, manifest, manifest.builds[static[0].name], options, cache, static=static[1:])
            manifest = _up_to_date(checkpoint, Build(precision, flavour, 0), on_export, (*COMPONENTS, *optional))
            return Flux(checkpoint, manifest, manifest.builds[name], options, cache, static=static)
        # First, because it is the smaller part of what may be wrong.
        _up_to_date(checkpoint, Build(text_encoder_precision, flavour, 0), on_export, [ENCODER])
        manifest = _up_to_date(checkpoint, Build(precision, flavour, 0), on_export, (*WITHOUT_ENCODER, *optional))
        encoder = manifest.builds[build_name(text_encoder_precision, flavour)]
        return Flux(checkpoint, manifest, manifest.builds[name], options, cache, encoder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or model} can't be read: {error.strerror or error}") from None


def _export_parts(
    checkpoint: Checkpoint,
    precision: str,
    text_encoder_precision: str | None,
    flavour: str,
    kv: bool | None,
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
        kv=kv,
        renew=True,
    )


def _up_to_date(
    checkpoint: Checkpoint,
    wanted: Build,
    on_export: Callable[[Path], None] | None,
    parts: Sequence[str] = tuple(COMPONENTS),
) -> Manifest:
    """Return the manifest with a build of whose parts none is missing or out of date, after exporting those.

    Of `wanted`, only what names it counts.
    """
    name, root = wanted.name, checkpoint.root
    manifest, missing = _to_export(checkpoint, name, parts)
    if not missing:
        return manifest
    if on_export:
        on_export(root)
    known = manifest.builds[name].components if name in manifest.builds else {}
    edited = (why for part in missing if part in known and (why := fault(root, known[part])) and NOT_AS_EXPORTED in why)
    for reason in list(edited)[:1]:
        warn(f"{root}: {reason}, so it is exported again; keep your own graphs in another folder")
    with exclusive(root):
        # Another process may have exported it meanwhile. Some settings depend on the machine: on another one the build
        # starts anew.
        for _ in range(MOST_EXPORTS):
            manifest, missing = _to_export(checkpoint, name, parts)
            if not missing:
                return manifest
            _export(root, manifest, wanted, missing)
    raise ExportError(f"the files of {root} change while they are exported: close what writes them, and run it again")


def _unusual(checkpoint: Checkpoint, build: Build, provider: str) -> Choice | None:
    """Return why a build is used, if it is not the one that its directory would get if it had none."""
    if not checkpoint.has_weights("transformer"):
        return None
    if build.name == build_name(default_precision(checkpoint, provider), traits(provider).flavour):
        return None
    reason = f"{checkpoint.root} holds the build {build.name} (--precision asks for another one)"
    return Choice(build.precision, provider, reason)


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
    return encoder_beside(checkpoint.root, manifest, build)


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
    broken = {part: why for part in stale if (why := unusable(root, known.get(part), part, layers))}
    if reasons and not broken:
        return manifest, []  # never a part of it: a build has one format, and one set of settings
    for part, reason in reasons.items():
        if part in broken:
            why = f"the {name} build of {root} {broken[part]}, and {reason}"
            raise CheckpointError(f"{why}: {_cure(root, build, part)}")
    return manifest, stale


def _cure(root: Path, build: Build, part: str) -> str:
    """Return what makes a build again that can't be exported from its own directory."""
    if parts := build.parsed_settings.parts:
        flags = " ".join(sorted({f"--{FOLDERS[name].replace('_', '-')} FILE" for name in parts}))
        return f"make it again with fluxonnx export -d {root} {build.flags} {flags}"
    kv = " --kv" if part in KV_COMPONENTS else ""
    return f"make it again with fluxonnx export -d CHECKPOINT -o {root} {build.flags}{kv}"


def _not_exportable(checkpoint: Checkpoint, build: Build, part: str) -> str | None:
    """Return why a component can't be exported here; None if it can."""
    folder = FOLDERS[part]
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


def _export(root: Path, manifest: Manifest, wanted: Build, components: list[str]) -> None:
    """Export the components that a build lacks, with the settings of the build."""
    from fluxonnx.export import export

    stale = manifest.builds.get(wanted.name)
    settings = (stale or wanted).parsed_settings
    export(
        root,
        precision=wanted.precision,
        flavour=wanted.flavour,
        components=components,
        keep=settings.keep,
        block=settings.block,
        rotate=settings.rotate,
        shape=(settings.shape.width, settings.shape.height) if settings.shape else None,
        text_seq=settings.shape.text_seq if settings.shape else None,
        shard_size=settings.shard_size,
        transformer=_replacement(root, stale, "transformer") if stale else None,
        text_encoder=_replacement(root, stale, "text_encoder") if stale else None,
        vae=(_replacement(root, stale, "vae_encoder") or _replacement(root, stale, "vae_decoder")) if stale else None,
        # A stale graph is derived from other files: overwriting it loses nothing.
        renew=True,
    )
