"""Measure portable graphs in every runtime that is installed.

`python -m tests.conformance --write` writes the tables of docs/runtimes.md, which takes some minutes. Without `--write`
it prints them. Names of runtimes choose some: `--write openvino tract`.
`python -m tests.conformance --only RUNTIME PRECISION FOLDER` prints one runtime's results as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.contract import COMPONENTS
from fluxonnx.export import export
from tests.conformance.graphs import CASES, make_inputs, run_onnxruntime
from tests.conformance.runtimes import RUNTIMES, missing, version
from tests.support import GRAPH_TOLERANCE, relative_error

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/runtimes.md"
BEGIN, END = "<!-- begin: python -m tests.conformance --write -->\n", "<!-- end -->\n"
PRECISIONS = ("fp32", "int8", "int4", "fp16", "bf16")
# What a runtime may take for all graphs of a precision, in seconds.
PATIENCE = 200
Result = float | str


def components_of(name: str, precision: str) -> tuple[str, ...]:
    """The graphs to measure: all in float32; compilers, and convolutions in numpy, take too long for the rest."""
    if precision != "fp32" and RUNTIMES[name].SIZES == "fixed":
        return ()
    return tuple(COMPONENTS)[:3] if precision != "fp32" and name == "reference" else tuple(COMPONENTS)


def measure(name: str, precision: str, folder: Path) -> None:
    """Print a line of JSON per graph: its name, and the largest relative error or what went wrong."""
    for component in components_of(name, precision):
        file = folder / graph_file(component, precision, "portable")
        try:
            errors = []
            for case in CASES[:1] if RUNTIMES[name].SIZES == "fixed" else CASES:
                inputs = make_inputs(file, *case)
                found, expected = RUNTIMES[name].run(file, inputs), run_onnxruntime(file, inputs)
                errors += [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
            result: Result = max(errors)
        except Exception as error:  # whatever a runtime raises
            result = f"{type(error).__name__}: {error}"
        print(json.dumps([component, result]), flush=True)


def measured(name: str, precision: str, folder: Path) -> dict[str, Result]:
    """The results of one runtime, measured in a process of its own: some of them crash."""
    asked = components_of(name, precision)
    if not asked:
        return {}
    command = [sys.executable, "-m", "tests.conformance", "--only", name, precision, str(folder)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        output, ending = done.stdout, f"the process ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output, ending = (late.stdout or b"").decode(), f"took more than {PATIENCE} seconds"
    found = dict(json.loads(line) for line in output.splitlines() if line.startswith('["'))
    return {component: found.get(component, ending) for component in asked}


def shortened(fault: str) -> str:
    """What went wrong in a line of a table, without the folders of this machine."""
    words = [Path(word).name if word.startswith(("/", "'/")) and len(word) > 1 else word for word in fault.split()]
    line = " ".join(words).replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
    return line if len(line) < 160 else line[:157] + "..."


def tables(results: dict[str, dict[str, dict[str, Result]]]) -> str:
    """The Markdown of results by precision, runtime and graph."""
    lines = ["| runtime | version | sizes |", "|---|---|---|"]
    lines += [f"| {RUNTIMES[name].TITLE} | {version(name)} | {RUNTIMES[name].SIZES} |" for name in results["fp32"]]
    faults: dict[tuple[str, str, str], list[str]] = {}
    for precision, rows in results.items():
        lines += ["", f"### {precision}", "", f"| runtime | {' | '.join(COMPONENTS)} |"]
        lines += ["|---|" + "---|" * len(COMPONENTS)]
        for name, found in rows.items():
            if not found:
                continue
            cells = []
            for component in COMPONENTS:
                result = found.get(component, "")
                if result == "":
                    cells.append("-")
                    continue
                cells.append("no" if isinstance(result, str) else f"{result:.0e}" if result else "0")
                if isinstance(result, str):
                    faults.setdefault((RUNTIMES[name].TITLE, precision, shortened(result)), []).append(component)
            lines.append(f"| {RUNTIMES[name].TITLE} | {' | '.join(cells)} |")
        whole = sum(
            len(found) == len(COMPONENTS)
            and all(not isinstance(result, str) and result < GRAPH_TOLERANCE for result in found.values())
            for found in rows.values()
        )
        lines += [
            "",
            f"All five graphs within {GRAPH_TOLERANCE:.0e}: {whole} of {sum(map(bool, rows.values()))} runtimes.",
        ]
    if faults:
        lines += ["", "### What they said", "", "| runtime | precision | graphs | message |", "|---|---|---|---|"]
    for (title, precision, fault), components in faults.items():
        lines.append(f"| {title} | {precision} | {', '.join(components)} | `{fault}` |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Measure everything that is installed."""
    if arguments[:1] == ["--only"]:
        name, precision, folder = arguments[1:]
        measure(name, precision, Path(folder))
        return
    chosen = [name for name in arguments if name != "--write"] or list(RUNTIMES)
    names = [name for name in chosen if not missing(name)]
    print(f"not installed: {', '.join(sorted(set(RUNTIMES) - set(names))) or 'none'}", file=sys.stderr)
    results: dict[str, dict[str, dict[str, Result]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for precision in PRECISIONS:
            folder = Path(temporary) / precision
            export(ROOT / "models/tiny-klein", folder, precision=precision, flavour="portable")
            with ThreadPoolExecutor(2) as pool:
                found = pool.map(lambda name: measured(name, precision, folder), names)  # noqa: B023
                results[precision] = dict(zip(names, found, strict=True))
            if "--write" in arguments:
                page = PAGE.read_text("utf-8")
                before, after = page.split(BEGIN)[0], page.split(END)[1]
                PAGE.write_text(before + BEGIN + tables(results) + END + after, "utf-8")
    if "--write" not in arguments:
        print(tables(results))


if __name__ == "__main__":
    main(sys.argv[1:])
