"""Measure portable graphs in every runtime that is installed.

`python -m tests.conformance --write` keeps what it measures in results.json beside this file and writes the tables of
docs/runtimes.md; compilers take hours. Without `--write` it prints the tables. Names of runtimes choose some:
`--write openvino tract`. The rest keeps what was measured before. `--tables` writes the tables anew, measuring nothing.
`python -m tests.conformance --only RUNTIME PRECISION FOLDER` prints one runtime's results as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.contract import COMPONENTS
from fluxonnx.export import export
from tests.conformance.graphs import CASES, make_inputs, run_onnxruntime
from tests.conformance.picture import Runtime, difference
from tests.conformance.runtimes import RUNTIMES, missing, version
from tests.conformance.tables import PRECISIONS, Result, Results, read_results, shortened, tables, write_results
from tests.support import relative_error

ROOT = Path(__file__).parents[2]
# What a runtime may take for all graphs of a precision, in seconds.
PATIENCE = 1800


def measure(name: str, precision: str, folder: Path) -> None:
    """Print a line of JSON per graph: its name, and the largest relative error or what went wrong; then the picture."""
    runtime, failed = Runtime(name), False
    for component in COMPONENTS:
        file = folder / graph_file(component, precision, "portable")
        try:
            errors = []
            for case in CASES:
                inputs = make_inputs(file, *case)
                found, expected = runtime.run(file, inputs), run_onnxruntime(file, inputs)
                errors += [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
            result: Result = max(errors)
        except Exception as error:  # whatever a runtime raises
            result, failed = shortened(f"{type(error).__name__}: {error}"), True
        print(json.dumps([component, result]), flush=True)
    if not failed:
        print(json.dumps(["picture", difference(folder, precision, runtime)]), flush=True)


def measured(name: str, precision: str, folder: Path) -> dict[str, Result]:
    """The results of one runtime, measured in a process of its own: some of them crash."""
    command = [sys.executable, "-m", "tests.conformance", "--only", name, precision, str(folder)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        output, ending = done.stdout, f"the process ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output, ending = (late.stdout or b"").decode(), f"took more than {PATIENCE} seconds"
    found = dict(json.loads(line) for line in output.splitlines() if line.startswith('["'))
    if not any(component in found for component in tuple(COMPONENTS)[1:]):
        print(done.stderr[-2000:], file=sys.stderr)
    missed = [component for component in COMPONENTS if component not in found]
    return found | dict.fromkeys(missed, ending)


def main(arguments: list[str]) -> None:
    """Measure everything that is installed."""
    if arguments[:1] == ["--only"]:
        name, precision, folder = arguments[1:]
        measure(name, precision, Path(folder))
        return
    if arguments == ["--tables"]:
        write_results(read_results())
        return
    chosen = [name for name in arguments if name != "--write"] or list(RUNTIMES)
    for name in chosen:
        if missing(name):
            print(f"{name}: not measured, since {', '.join(missing(name))} is not installed", file=sys.stderr)
    names = [name for name in chosen if not missing(name)]
    results: Results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for precision in PRECISIONS:
            folder = Path(temporary) / precision
            export(ROOT / "models/tiny-klein", folder, precision=precision, flavour="portable")
            for name in names:
                if "--write" in arguments:
                    results = read_results()
                row = results.setdefault(name, {"title": RUNTIMES[name].TITLE, "sizes": RUNTIMES[name].SIZES})
                row |= {"version": version(name), precision: measured(name, precision, folder)}
                if "--write" in arguments:
                    write_results(results)
    if "--write" not in arguments:
        print(tables(results))


if __name__ == "__main__":
    main(sys.argv[1:])
