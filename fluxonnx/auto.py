"""What suits a model directory and a machine: which of the builds that are there, or which precision and provider."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.formats import native_precision
from fluxonnx.checkpoint.manifest import (
    DEFAULT_PRECISION,
    Build,
    Component,
    Manifest,
    are_as_recorded,
    changed_config,
    fault,
    read_manifest,
)
from fluxonnx.contract import COMPONENTS, OLDEST_RUNNABLE_FORMAT
from fluxonnx.errors import CheckpointError
from fluxonnx.machine import has_exact_int8_dot
from fluxonnx.runtime.memory import SMALL
from fluxonnx.runtime.providers import CPU, OPENBLAS, available, traits, works

# Providers that are chosen unasked where they work. Others may be slower than the CPU.
FASTER_THAN_CPU = ("cuda",)

# The graph that may be of another build, and the others.
ENCODER = "text_encoder"
WITHOUT_ENCODER = tuple(name for name in COMPONENTS if name != ENCODER)

# Of several builds, the one whose pictures are closest to the checkpoint's comes first; fp16 is for providers that
# compute in it, as CPUs convert its weights to float32 when they load them.
CLOSEST_FIRST = ("bf16", "fp32", "int8", "int4", "fp16")
CLOSEST_FIRST_IN_HALF = ("fp16", "bf16-native", "fp32", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Choice:
    """A precision, a provider, and the reason in half a sentence."""

    precision: str
    provider: str
    reason: str

    def __str__(self) -> str:
        return f"Precision {self.precision}, provider {self.provider}: {self.reason}"


@dataclass(frozen=True)
class Surroundings:
    """What the choice depends on besides the model.

    Attributes:
        exact_int8_dot: See `machine.has_exact_int8_dot`.
        providers: The providers of the installed onnxruntime.
        works: Whether one of them can be started.
    """

    exact_int8_dot: bool
    providers: tuple[str, ...]
    works: Callable[[str], bool]


def surroundings() -> Surroundings:
    """Return the surroundings on this machine."""
    return Surroundings(has_exact_int8_dot(), tuple(available()), works)


def fastest_provider(here: Surroundings | None = None) -> tuple[str, str]:
    """Return the provider that `--provider auto` takes, and why: a GPU's where it works, else the CPU's."""
    here = here or surroundings()
    tried = [name for name in FASTER_THAN_CPU if name in here.providers]
    for name in tried:
        if here.works(name):
            return name, f"{name} works here, and GPUs compute faster than CPUs"
    if tried:
        return CPU, f"{', '.join(tried)} does not work here, see fluxonnx providers"
    return (
        CPU,
        f"there is no {' or '.join(FASTER_THAN_CPU)} here, and others may be slower: fluxonnx providers lists them",
    )


def choose(checkpoint: Checkpoint, provider: str | None = None) -> Choice:
    """Choose a precision for a checkpoint on this machine, and a provider unless that is given.

    Raises:
        CheckpointError: The transformer's weights are missing or corrupt.
    """
    tensors = checkpoint.tensors("transformer")
    weights = sum(tensor.nbytes for tensor in tensors.values())
    return choose_for(weights, native_precision(tensors), provider, surroundings())


def choose_for(weights: int, native: str | None, provider: str | None, here: Surroundings) -> Choice:
    """Choose a precision, and a provider unless that is given.

    On CPUs int8 is the fastest, even where its mapped weights do not stay in memory and are read again in each step.
    int4 needs more memory of its own.

    Args:
        weights: Bytes of the transformer's weights.
        native: "int8" or "int4" if they are such integers already; None for floats.
        provider: The provider to run on.
        here: The machine.
    """
    if native:
        bits = native.removeprefix("int")
        return Choice(native, provider or CPU, f"the transformer's weights are {bits}-bit integers already")
    if weights < SMALL:
        reason = f"the transformer's {weights / 1e6:.0f} MB of weights cost nothing as they are"
        return Choice("bf16", provider or CPU, reason)
    if provider is None:
        provider, _ = fastest_provider(here)
    if provider == OPENBLAS:
        return Choice("bf16", provider, "BLAS multiplies in float32, so integers would be no faster")
    if precision := traits(provider).precision:
        return Choice(precision, provider, f"{provider} computes faster in 16 bits than in 32")
    how = "has exact 8-bit dot products" if here.exact_int8_dot else "lacks VNNI, but 8-bit products are faster still"
    return Choice("int8", provider, f"this CPU {how}")


def default_precision(checkpoint: Checkpoint, provider: str = CPU) -> str:
    """Return the precision that suits a provider: bf16 for the CPU; but int8 where the checkpoint's weights are.

    Raises:
        CheckpointError: The transformer's weights are missing or corrupt.
    """
    return native_precision(checkpoint.tensors("transformer")) or traits(provider).precision or DEFAULT_PRECISION


@dataclass(frozen=True)
class Held:
    """A build that a directory holds; `encoder` is the precision of the build with its text encoder, if not its own."""

    build: Build
    encoder: str | None


def held_build(
    checkpoint: Checkpoint,
    provider: str,
    precision: str | None = None,
    flavour: str | None = None,
    other_encoder: bool = False,
) -> Held | None:
    """Return the build of a directory that suits a provider best, of those that can be run as they are.

    A build suits a provider if that runs its flavour right and has its number formats; in a directory from which
    nothing can be exported any build suits. Of several, the order is: one that is whole before one whose text encoder
    is of another build; one for any size before a static one, unless the provider wants that; the flavour that is
    fastest on the provider; the precision that a directory without builds would get; then that of `CLOSEST_FIRST`.

    Args:
        checkpoint: The directory.
        provider: The provider.
        precision: The precision that it must have; None for any.
        flavour: Likewise.
        other_encoder: Whether the text encoder of another build will be used.

    Returns:
        The build, or None if there is none. Where nothing can be exported, one that is damaged is better than none:
        opening it says what is wrong.
    """
    manifest = read_manifest(checkpoint.root)
    if manifest is None:
        return None
    exportable = checkpoint.has_weights("transformer")
    asked = [b for b in manifest.builds.values() if precision in (None, b.precision) and flavour in (None, b.flavour)]
    found = [
        Held(build, encoder)
        for build in asked
        if flavour or not exportable or suits(build, provider)
        for encoder in _encoders(checkpoint.root, manifest, build, other_encoder)
    ]
    if found:
        first = _usual_precision(checkpoint, provider) if exportable else None
        return min(found, key=lambda held: _rank(held, provider, first))
    if exportable:
        return None
    whole = [b for b in asked if b.components and all(part.self_contained for part in b.components.values())]
    damaged = min(whole, key=lambda build: _rank(Held(build, None), provider, None), default=None)
    return Held(damaged, None) if damaged else None


def suits(build: Build, provider: str) -> bool:
    """Whether a provider runs the graphs of a build right, and without leaving most of them to the CPU."""
    known = traits(provider)
    return build.precision not in known.lacking and (build.flavour == known.flavour or known.flavour == "ort")


def unsuited(checkpoint: Checkpoint, build: Build, provider: str) -> str | None:
    """Return why a provider leaves much of a build to the CPU, with the command that helps; None if it does not."""
    known = traits(provider)
    flavour, precision = known.flavour, known.precision or build.precision
    if not suits(build, provider):
        what = f"has no numbers of {build.precision}" if build.precision in known.lacking else "runs portable graphs"
        reason = f"{provider} {what}"
    elif known.static_shapes and build.shape is None:
        reason = f"{provider} takes only graphs of one size"
    else:
        return None
    best = Build(precision, flavour, 0).flags + (" --shape WxH" if known.static_shapes else "")
    return (
        f"the {build.name} build of {checkpoint.root} is not made for {provider} ({reason}), much of it may run on the "
        f"CPU: make one that is with fluxonnx export {checkpoint.export_place} {best}"
    )


def _usual_precision(checkpoint: Checkpoint, provider: str) -> str | None:
    """Return `default_precision`, or None where the weights can't be read, which a build may not need."""
    try:
        return default_precision(checkpoint, provider)
    except CheckpointError:
        return None


def _rank(held: Held, provider: str, first: str | None) -> tuple[object, ...]:
    known, build = traits(provider), held.build
    order = CLOSEST_FIRST if known.precision is None else CLOSEST_FIRST_IN_HALF
    place = order.index(build.precision) if build.precision in order else len(order)
    static = build.shape is not None
    return (
        held.encoder is not None,
        static and not known.static_shapes,
        build.flavour != known.flavour,
        build.precision != first,
        place,
        build.name,
    )


def static_builds(checkpoint: Checkpoint, precision: str, flavour: str) -> tuple[list[Build], list[tuple[Build, str]]]:
    """Return the static builds of a precision and a flavour that can be run as they are, and why the others can't."""
    manifest = read_manifest(checkpoint.root) or Manifest()
    usable: list[Build] = []
    broken: list[tuple[Build, str]] = []
    for build in manifest.builds.values():
        if build.shape and (build.precision, build.flavour) == (precision, flavour):
            reason = _unusable_part(checkpoint.root, manifest, build)
            if reason:
                broken.append((build, reason))
            else:
                usable.append(build)
    return usable, broken


def _unusable_part(root: Path, manifest: Manifest, build: Build) -> str | None:
    for part in COMPONENTS:
        component = build.components.get(part)
        if reason := unusable(root, component, part, manifest.text_encoder_out_layers):
            return reason
        if component and not are_as_recorded(root, component):
            return "was made from other weights"
    return None


def _encoders(root: Path, manifest: Manifest, build: Build, other: bool) -> Iterator[str | None]:
    """Yield None if all graphs of a build can be run; the precision of another build if its text encoder is missing.

    Yield nothing if neither helps.
    """
    layers = manifest.text_encoder_out_layers

    def usable(part: str) -> bool:
        return unusable(root, build.components.get(part), part, layers) is None

    if not all(map(usable, WITHOUT_ENCODER)):
        return
    if other or usable(ENCODER):
        yield None
    elif ENCODER not in build.components and (precision := encoder_beside(root, manifest, build)):
        yield precision


def encoder_beside(root: Path, manifest: Manifest, build: Build) -> str | None:
    """Return the precision of another build whose text encoder a build can use; None if there is none."""
    layers = manifest.text_encoder_out_layers
    for other in manifest.builds.values():
        if other.flavour == build.flavour and not unusable(root, other.components.get(ENCODER), ENCODER, layers):
            return other.precision
    return None


def unusable(root: Path, component: Component | None, part: str, out_layers: list[int] | None) -> str | None:
    """Return why a graph can't be run as it is, current or not; None if it can.

    Args:
        root: The model directory.
        component: The graph; None if the build has none.
        part: Its name.
        out_layers: The manifest's `text_encoder_out_layers`.
    """
    if component is None:
        return f"has no {part} graph"
    if component.graph_format < OLDEST_RUNNABLE_FORMAT:
        return "is of a format that can't be run any more"
    if found := fault(root, component):
        return f"is not whole ({found})"
    config = changed_config(root, component, out_layers)
    return f"is out of date ({config} has changed)" if config else None
