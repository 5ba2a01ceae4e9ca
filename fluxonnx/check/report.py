"""All checks of a model directory in order, and what they come to: lines, JSON, and one line for a bug report."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fluxonnx.check import architecture, builds, files, picture, tokenizer, weights
from fluxonnx.check.findings import FAILED, STATES, Finding, examined
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import DEFAULT_PRECISION, Manifest, read_manifest
from fluxonnx.contract import Architecture
from fluxonnx.errors import FluxonnxError
from fluxonnx.export.precisions import make_precision
from fluxonnx.machine import cpu_flags
from fluxonnx.measure.tables import machine
from fluxonnx.runtime.providers import available
from fluxonnx.version import __version__

# Features of a processor on which the speed and the rounding of graphs depend.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "bf16")

# Without these, nothing can be drawn.
NEEDED = (files.SUBJECT, architecture.SUBJECT)


@dataclass(frozen=True)
class Plan:
    """What to check; see the flags of `fluxonnx check`.

    Attributes:
        model: The model directory.
        picture: Whether to draw the known pictures; None for whether the model is the one that they are known of.
        precisions: The builds that draw them, beside the default one.
        whole: Whether every weight is read.
    """

    model: Path
    picture: bool | None = None
    precisions: tuple[str, ...] = ()
    whole: bool = False


@dataclass
class Report:
    """What was found.

    Attributes:
        plan: What was asked for.
        findings: In the order in which they were found.
        model: The name of the known model, or None.
        digests: Of the parts of the model, see `files.short_digests`.
        builds: The states of the builds by name.
    """

    plan: Plan
    findings: list[Finding] = field(default_factory=list)
    model: str | None = None
    digests: dict[str, str] = field(default_factory=dict)
    builds: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether anything failed."""
        return any(finding.state == FAILED for finding in self.findings)


def run(
    plan: Plan,
    found: Callable[[Finding], None] = lambda finding: None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Check a model directory, in whatever state it is.

    Args:
        plan: What to check.
        found: Called with each finding as soon as there is one.
        say: Called with each line of progress.
        progress: Called with what is being read, how much of it was, and how much there is.

    Raises:
        UsageError: A precision does not exist.
        CheckpointError: There is no such directory.
    """
    for name in plan.precisions:
        make_precision(name)
    report = Report(plan)
    checkpoint, about_index = files.open_any(plan.model)

    def take(findings: Iterable[Finding]) -> None:
        for finding in findings:
            report.findings.append(finding)
            found(finding)

    take([about_index])
    manifest, damaged = _manifest(plan.model)
    sizes: list[Architecture] = []
    take(examined(files.SUBJECT, lambda: files.components(checkpoint, manifest)))
    take(examined(architecture.SUBJECT, lambda: _architecture(report, checkpoint, manifest, sizes)))
    if sizes:
        take(examined(files.SUBJECT, lambda: files.fit(checkpoint, sizes[0])))
    vocab = sizes[0].text_encoder.vocab if sizes else None
    take(examined(tokenizer.SUBJECT, lambda: tokenizer.check(checkpoint, vocab)))
    for part in weights.PARTS:
        take(examined(weights.SUBJECT, lambda part=part: weights.check(checkpoint, part, plan.whole, progress)))  # type: ignore[misc]
    if damaged:
        take([damaged])
    else:
        if manifest:
            take(examined(files.SUBJECT, lambda: files.fingerprints(checkpoint, manifest)))
        take(examined(builds.SUBJECT, lambda: builds.check(plan.model, manifest)))
    take(examined(picture.SUBJECT, lambda: _pictures(report, checkpoint, say)))
    report.digests = files.short_digests(checkpoint)
    report.builds = {f.figures["build"]: f.state for f in report.findings if "build" in f.figures}
    return report


def _manifest(root: Path) -> tuple[Manifest | None, Finding | None]:
    try:
        return read_manifest(root), None
    except FluxonnxError as error:
        return None, Finding(FAILED, builds.SUBJECT, str(error))


def _architecture(
    report: Report, checkpoint: Checkpoint, manifest: Manifest | None, sizes: list[Architecture]
) -> Iterator[Finding]:
    """Read the config files; they and the name of the model are noted for the checks that follow."""
    from fluxonnx.export.components import read_architecture

    layers = manifest.text_encoder_out_layers if manifest else None
    sizes.append(read_architecture(checkpoint, tuple(layers) if layers else None))
    known = architecture.recognise(checkpoint, sizes[0])
    report.model = known.name
    yield from architecture.check(known, sizes[0])


def _pictures(report: Report, checkpoint: Checkpoint, say: Callable[[str], None]) -> Iterator[Finding]:
    plan = report.plan
    if plan.picture is False:
        yield picture.skipped("not drawn, as --no-picture says")
        return
    if report.model != picture.KNOWN_MODEL:
        yield picture.skipped(f"no picture of this model is known, only of {picture.KNOWN_MODEL}")
        return
    if wrong := [f.subject for f in report.findings if f.state == FAILED and f.subject in NEEDED]:
        yield picture.skipped(f"not drawn, because the check of {wrong[0]} failed: mend that first")
        return
    looks_random = any(finding.figures.get("looks_random") for finding in report.findings)
    first = DEFAULT_PRECISION if checkpoint.has_weights("transformer") else None
    others = [name for name in dict.fromkeys(plan.precisions) if name != first]
    yield from picture.check(plan.model, picture.known(), [first, *others], looks_random, say)


def summary(report: Report) -> str:
    """Return the line to paste into a bug report: software, machine and providers, model, builds, result."""
    here = machine()
    features = [name for name in FEATURES if name in cpu_flags()]
    model = " ".join([report.model or "unknown model", *(f"{k}:{v}" for k, v in report.digests.items())])
    return "; ".join(
        [
            f"fluxonnx {__version__}, onnxruntime {here['onnxruntime']}, Python {here['python']}, {here['system']}",
            f"{here['cores']} cores, {' '.join(features) or platform.machine()}, providers {' '.join(available())}",
            model,
            "builds " + (", ".join(f"{name} {state}" for name, state in report.builds.items()) or "none"),
            outcome(report),
        ]
    )


def outcome(report: Report) -> str:
    """Return what failed, and how many findings there are of each state."""
    count = Counter(finding.state for finding in report.findings)
    subjects = dict.fromkeys(finding.subject for finding in report.findings if finding.state == FAILED)
    result = f"failed: {', '.join(subjects)}" if subjects else "good"
    return f"{result} ({', '.join(f'{count[state]} {state}' for state in STATES if count[state])})"


def line(finding: Finding) -> str:
    """Return a finding as a line of a report."""
    return f"{finding.state:<8}{finding.subject:<11}{finding.text}"


def as_json(report: Report) -> dict[str, Any]:
    """Return everything that was found, measured and asked for."""
    return {
        "directory": str(report.plan.model),
        "result": FAILED if report.failed else "ok",
        "model": report.model,
        "digests": report.digests,
        "builds": report.builds,
        "findings": [asdict(finding) for finding in report.findings],
        "machine": {**machine(), "features": [name for name in FEATURES if name in cpu_flags()]},
        "summary": summary(report),
    }


def to_text(report: Report) -> str:
    """Return `as_json` as text; numbers that JSON lacks are null."""
    return json.dumps(_finite(as_json(report)), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
