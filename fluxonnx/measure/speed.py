"""Seconds and memory of several configurations: alternating rounds, each picture made by a process of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from fluxonnx import api
from fluxonnx.checkpoint.manifest import DEFAULT_PRECISION, build_name
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.files import describe_os_error
from fluxonnx.measure.picture import PROMPT, SEED, load_all, measure
from fluxonnx.measure.tables import known_median, machine, number, table
from fluxonnx.runtime.outputs import write_output
from fluxonnx.runtime.providers import CPU, traits

DEFAULT_SIZE = "256"

# Operator types that a printed profile shows per graph; the JSON has all of them.
TOP = 8


@dataclass(frozen=True)
class Configuration:
    """One combination of what is varied."""

    width: int
    height: int
    precision: str
    threads: int | None
    provider: str = CPU

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' if self.threads != 1 else ''}" if self.threads is not None else ""
        provider = f", {self.provider}" if self.provider != CPU else ""
        return f"{self.width}x{self.height}, {self.precision}{threads}{provider}"

    @property
    def build(self) -> tuple[str, str]:
        """Precision and flavour."""
        return self.precision, traits(self.provider).flavour


@dataclass(frozen=True)
class Plan:
    """What to measure; see the flags of `fluxonnx bench`."""

    model: Path
    configurations: list[Configuration]
    prompt: str = PROMPT
    steps: int | None = None
    repeat: int = 1
    export: bool = False
    profile: bool = False
    low_memory: bool = False
    text_encoder_precision: str | None = None
    lora: tuple[str, ...] = ()


@dataclass
class Result:
    """The measurements of one configuration.

    Attributes:
        configuration: Which one.
        runs: What `picture.measure_picture` returned, once per round.
        profile: What `picture.measure_operators` returned; None if it was not asked for.
        error: Why measurements are missing; None if none are.
    """

    configuration: Configuration
    runs: list[dict[str, Any]] = field(default_factory=list)
    profile: dict[str, list[dict[str, Any]]] | None = None
    error: str | None = None

    @property
    def phases(self) -> dict[str, dict[str, float | None]]:
        """Seconds and peak memory of each phase, medians over the runs."""
        first = self.runs[0]["phases"] if self.runs else {}
        return {
            name: {key: known_median(run["phases"][name][key] for run in self.runs) for key in values}
            for name, values in first.items()
        }

    @property
    def step(self) -> float | None:
        """The median of all steps except the first of each run."""
        return known_median(seconds for run in self.runs for seconds in run["steps"])

    @property
    def seconds(self) -> float | None:
        """From the prompt to the picture, median over the runs."""
        return known_median(run["seconds"] for run in self.runs)


@dataclass
class Report:
    """All measurements; `exports` has one entry per build if the export was measured."""

    plan: Plan
    exports: dict[str, dict[str, Any]]
    results: list[Result]

    @property
    def failure(self) -> str | None:
        """One line about the configurations that failed; None if none did."""
        failed = [result for result in self.results if result.error]
        if not failed:
            return None
        count = f"{len(failed)} of {len(self.results)} configurations failed: " if len(self.results) > 1 else ""
        return f"{count}{failed[0].configuration}: {failed[0].error}"


def parse_size(text: str) -> tuple[int, int]:
    """Parse "256x512" or "256" into width and height.

    Raises:
        UsageError: It is neither.
    """
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if not match:
        raise UsageError(f"size {text!r} is not a size: write 256, or 256x512 for width and height")
    return int(match[1]), int(match[2] or match[1])


def combine(
    sizes: Sequence[str], precisions: Sequence[str], threads: Sequence[int], providers: Sequence[str] = ()
) -> list[Configuration]:
    """Return all combinations without duplicates.

    An empty sequence stands for the default. The default precision is the provider's.

    Raises:
        UsageError: A size can't be parsed.
    """
    counts: Sequence[int | None] = threads or [None]
    return list(
        dict.fromkeys(
            Configuration(*size, precision, count, provider)
            for size, provider in product(map(parse_size, sizes or [DEFAULT_SIZE]), providers or [CPU])
            for precision in precisions or [traits(provider).precision or DEFAULT_PRECISION]
            for count in counts
        )
    )


def prepare(plan: Plan, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Validate the plan, and export the builds that are missing.

    Returns:
        What `picture.measure_export` returned for each build; empty if the export is not to be measured.

    Raises:
        UsageError: A value is out of its range.
        FluxonnxError: The model can't be used.
    """
    from fluxonnx.export.components import make_target
    from fluxonnx.runtime.engine import SessionOptions
    from fluxonnx.runtime.request import Request

    if plan.repeat < 1:
        raise UsageError(f"repeat is {plan.repeat}, but must be at least 1")
    for configuration in plan.configurations:
        make_target(*configuration.build, None)
        SessionOptions(threads=configuration.threads, provider=configuration.provider)
    exports = {}
    for precision, flavour in dict.fromkeys(configuration.build for configuration in plan.configurations):
        build: dict[str, Any] = {"precision": precision, "flavour": flavour}
        if plan.export:
            name = build_name(precision, flavour)
            exports[name] = measure(
                "export", model=str(plan.model), text_encoder_precision=plan.text_encoder_precision, **build
            )
            say(f"export {name}: {exports[name]['seconds']:.2f} s")
        with api.load(
            plan.model,
            **build,
            text_encoder_precision=plan.text_encoder_precision,
            on_export=lambda root: say(f"Exporting {root} ..."),
        ) as flux:
            load_all(flux, plan.lora)
            for configuration in plan.configurations:
                width, height = configuration.width, configuration.height
                flux.check(Request(prompt=plan.prompt, width=width, height=height, steps=plan.steps))
    return exports


def run(plan: Plan, say: Callable[[str], None]) -> Report:
    """Measure in rounds: every configuration once per round, so that other load on the machine affects all equally.

    Args:
        plan: What to measure.
        say: Called with each line of progress.

    Raises:
        UsageError: A value is out of its range.
        FluxonnxError: The model can't be used. A single configuration that fails does not end the others: see
            `Report.failure`.
    """
    exports = prepare(plan, say)
    results = [Result(configuration) for configuration in plan.configurations]
    for i in range(plan.repeat):
        for result in results:
            if not result.error:
                _measure(plan, result, f"run {i + 1} of {plan.repeat}", say)
    return Report(plan, exports, results)


def _measure(plan: Plan, result: Result, run: str, say: Callable[[str], None]) -> None:
    job = {
        "model": str(plan.model),
        "prompt": plan.prompt,
        "steps": plan.steps,
        "low_memory": plan.low_memory,
        "text_encoder_precision": plan.text_encoder_precision,
        "lora": plan.lora,
        **asdict(result.configuration),
    }
    try:
        result.runs.append(measure("picture", **job))
        say(f"{result.configuration}: {run}: {result.runs[-1]['seconds']:.2f} s")
        if plan.profile and result.profile is None:
            # Another picture, since the profiler slows a run down.
            result.profile = measure("operators", **job)
    except FluxonnxError as error:
        result.error = str(error)
        say(f"{result.configuration}: failed: {error}")


def as_json(report: Report) -> dict[str, Any]:
    """Return all measurements, and the circumstances in which they were made, as plain values."""
    plan = report.plan
    steps = (len(run["steps"]) + 1 for result in report.results for run in result.runs)
    return {
        "machine": machine(),
        "model": plan.model.resolve().name,
        "prompt": plan.prompt,
        "seed": SEED,
        "steps": plan.steps or next(steps, None),
        "repeat": plan.repeat,
        "low_memory": plan.low_memory,
        "text_encoder_precision": plan.text_encoder_precision,
        "lora": list(plan.lora),
        "exports": report.exports,
        "results": [
            {
                **asdict(result),
                "phases": result.phases,
                "step_seconds": result.step,
                "seconds": result.seconds,
            }
            for result in report.results
        ],
    }


def save(report: Report, path: Path) -> None:
    """Write the report as JSON; a failure leaves no partial file.

    Raises:
        FluxonnxError: It can't be written.
    """
    try:
        write_output(path, (json.dumps(as_json(report), indent=2) + "\n").encode())
    except OSError as error:
        raise FluxonnxError(describe_os_error(error, path, "choose another with --json")) from None


def render(report: Report) -> str:
    """Return the report as tables in Markdown."""
    here = machine()
    parts = [f"{here['processor']}, {here['cores']} cores, onnxruntime {here['onnxruntime']}"]
    if report.plan.low_memory:
        parts[0] += ", with --low-memory"
    if report.plan.text_encoder_precision:
        parts[0] += f", text encoder in {report.plan.text_encoder_precision}"
    if report.plan.lora:
        parts[0] += f", with {', '.join(report.plan.lora)}"
    if report.exports:
        rows = [
            [build, number(export["seconds"]), *_gigabytes(export), f"{export['bytes_written'] / 1e6:.2f}"]
            for build, export in report.exports.items()
        ]
        parts.append(table(["export", "seconds", "anonymous GB", "mapped GB", "MB written"], rows))
    rows = [row for result in report.results for row in result_rows(result)]
    header = ["size", "precision", "threads", "provider", "phase", "seconds", "anonymous GB", "mapped GB"]
    parts.append(table(header, rows))
    for result in report.results:
        if result.profile is not None:
            parts.append(f"Operators, {result.configuration}:\n\n{_operators(result.profile)}")
    return "\n\n".join(parts)


def result_rows(result: Result) -> list[list[str]]:
    """Return the table rows of a configuration: its phases, one step, and the total."""
    configuration = result.configuration
    name = [
        f"{configuration.width}x{configuration.height}",
        configuration.precision,
        str(configuration.threads or "all"),
        configuration.provider,
    ]
    rows = [[*name, phase, number(values["seconds"]), *_gigabytes(values)] for phase, values in result.phases.items()]
    if result.step is not None:
        rows.append([*name, "one step (median after the first)", number(result.step), "", ""])
    if result.runs:
        rows.append([*name, "total", number(result.seconds), "", ""])
    if result.error:
        rows.append([*name, "failed", "", "", ""])
    return rows


def _operators(profile: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for graph, operators in profile.items():
        for row in operators[:TOP]:
            rows.append([graph, row["type"], str(row["calls"]), f"{row['seconds'] * 1e3:.1f}", f"{row['share']:.1%}"])
        rest = operators[TOP:]
        if rest:
            calls, seconds, share = (sum(row[key] for row in rest) for key in ("calls", "seconds", "share"))
            rows.append([graph, f"{len(rest)} others", str(calls), f"{seconds * 1e3:.1f}", f"{share:.1%}"])
    return table(["graph", "operator", "calls", "ms", "share"], rows)


def _gigabytes(values: dict[str, Any]) -> list[str]:
    return [f"{values[key]:.2f}" if values[key] is not None else "" for key in ("anonymous_gb", "mapped_gb")]
