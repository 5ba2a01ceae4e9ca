"""Seconds and memory for several configurations, in turns, each picture by a process of its own."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from fluxonnx import __version__, api
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.files import explain, probe, replacing
from fluxonnx.manifest import DEFAULT_PRECISION, build_name
from fluxonnx.measure import PROMPT, SEED, run_program
from fluxonnx.runtime.providers import CPU, traits

DEFAULT_SIZE = "256"

OTHERWISE = "choose another with --json"

# Operator types a printed profile shows per graph; the JSON has them all.
TOP = 8


@dataclass(frozen=True)
class Configuration:
    """What is varied."""

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
    """What is to be measured; see the flags of `fluxonnx bench`."""

    model: Path
    configurations: list[Configuration]
    prompt: str = PROMPT
    steps: int | None = None
    repeat: int = 1
    export: bool = False
    profile: bool = False
    low_memory: bool = False


@dataclass
class Result:
    """What was found about a configuration.

    Attributes:
        configuration: Which one.
        runs: What `measure.measure_picture` found, once per round.
        profile: What `measure.measure_operators` found, if it was asked.
        error: Why there is no more of it, or None.
    """

    configuration: Configuration
    runs: list[dict[str, Any]] = field(default_factory=list)
    profile: dict[str, list[dict[str, Any]]] | None = None
    error: str | None = None

    @property
    def phases(self) -> dict[str, dict[str, float | None]]:
        """Seconds and peaks of memory per phase, medians over the runs."""
        return {
            name: {key: middle(run["phases"][name][key] for run in self.runs) for key in self.runs[0]["phases"][name]}
            for name in (self.runs[0]["phases"] if self.runs else ())
        }

    @property
    def step(self) -> float | None:
        """The median of all steps but the first of each run."""
        return middle(seconds for run in self.runs for seconds in run["steps"])

    @property
    def seconds(self) -> float | None:
        """From the prompt to the picture, median over the runs."""
        return middle(run["seconds"] for run in self.runs)


@dataclass
class Report:
    """What was found in all."""

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


def middle(values: Iterable[float | None]) -> float | None:
    """Return the median; None if there is nothing, or nothing known."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def parse_size(text: str) -> tuple[int, int]:
    """Turn "256x512" or "256" into width and height.

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
    """Return all combinations, each once; nothing given means the default, of precisions the provider's.

    Raises:
        UsageError: A size is not one.
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


def check_output(path: Path, flag: str = "--json") -> None:
    """Find out before a long run whether the file that `flag` names can be written.

    Raises:
        UsageError: It is a folder, or in one that does not exist.
        FluxonnxError: There is no permission.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{path} can't be written: {flag} takes the name of a file in a folder that exists")
    try:
        probe(path)
    except OSError as error:
        raise FluxonnxError(explain(error, path, f"choose another with {flag}")) from None


def prepare(plan: Plan, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Refuse what can't be measured, and export what was not exported yet.

    Returns:
        What `measure.measure_export` found per build, if that is to be measured.

    Raises:
        UsageError: A value is out of its range.
        FluxonnxError: The model can't be used.
    """
    from fluxonnx.export.exporter import make_target
    from fluxonnx.runtime.request import Request
    from fluxonnx.runtime.session import SessionOptions

    if plan.repeat < 1:
        raise UsageError(f"repeat is {plan.repeat}, but must be at least 1")
    for configuration in plan.configurations:
        make_target(*configuration.build, None)
        SessionOptions(configuration.threads, provider=configuration.provider)
    exports = {}
    for precision, flavour in dict.fromkeys(configuration.build for configuration in plan.configurations):
        build: dict[str, Any] = {"precision": precision, "flavour": flavour}
        if plan.export:
            name = build_name(precision, flavour)
            exports[name] = _in_own_process("export", model=str(plan.model), **build)
            say(f"export {name}: {exports[name]['seconds']:.2f} s")
        with api.load(plan.model, **build, on_export=lambda root: say(f"Exporting {root} ...")) as flux:
            for configuration in plan.configurations:
                width, height = configuration.width, configuration.height
                flux.check(Request(prompt=plan.prompt, width=width, height=height, steps=plan.steps))
    return exports


def run(plan: Plan, say: Callable[[str], None]) -> Report:
    """Measure; configurations take turns, so that what else the machine does hits them alike.

    Args:
        plan: What to measure.
        say: Told what is going on, line by line.

    Raises:
        UsageError: A value is out of its range.
        FluxonnxError: The model can't be used. A single configuration that fails does not end the others: see
            `Report.failure`.
    """
    exports = prepare(plan, say)
    results = [Result(configuration) for configuration in plan.configurations]
    for turn in range(plan.repeat):
        for result in results:
            _measure(plan, result, f"run {turn + 1} of {plan.repeat}", say)
    return Report(plan, exports, results)


def _measure(plan: Plan, result: Result, turn: str, say: Callable[[str], None]) -> None:
    if result.error:
        return
    job = {
        "model": str(plan.model),
        "prompt": plan.prompt,
        "steps": plan.steps,
        "low_memory": plan.low_memory,
        **asdict(result.configuration),
    }
    try:
        result.runs.append(_in_own_process("picture", **job))
        say(f"{result.configuration}: {turn}: {result.runs[-1]['seconds']:.2f} s")
        if plan.profile and result.profile is None:
            # A run of its own, since the profiler costs time.
            result.profile = _in_own_process("operators", **job)
    except FluxonnxError as error:
        result.error = str(error)
        say(f"{result.configuration}: failed: {error}")


def _in_own_process(what: str, **job: Any) -> dict[str, Any]:
    """Run one of `measure.MEASUREMENTS` in a fresh process, so that its memory is its own."""
    package = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "fluxonnx.measure", json.dumps({"measure": what, **job})]
    output = run_program(command, {**os.environ, "PYTHONPATH": path}).output
    return json.loads(output.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Describe what the figures were made on and with."""
    import onnxruntime

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "fluxonnx": __version__,
    }


def _processor() -> str:
    with suppress(OSError):
        if match := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def as_json(report: Report) -> dict[str, Any]:
    """Return everything that was found and under which circumstances, as plain values."""
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
    """Write the report as JSON, whole or not at all.

    Raises:
        FluxonnxError: It can't be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(as_json(report), indent=2) + "\n", "utf-8")
    except OSError as error:
        raise FluxonnxError(explain(error, path, OTHERWISE)) from None


def render(report: Report) -> str:
    """Return the tables that are printed, in Markdown."""
    here = machine()
    parts = [f"{here['processor']}, {here['cores']} cores, onnxruntime {here['onnxruntime']}"]
    if report.plan.low_memory:
        parts[0] += ", with --low-memory"
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
    """Return a configuration's lines of the table: its phases, one step, and all."""
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
        rows.append([*name, "in all", number(result.seconds), "", ""])
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


def number(value: float | None) -> str:
    """Write seconds or a ratio with the digits that mean something; nothing for None."""
    if value is None:
        return ""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in Markdown, whose columns also stand in line on a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[*header], ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )
