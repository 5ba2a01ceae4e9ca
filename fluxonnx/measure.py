"""What it takes to make a picture: one measurement, in a process of its own, and the watching of memory.

`python -m fluxonnx.measure JOB` takes and prints JSON; `bench` runs it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from fluxonnx.errors import FluxonnxError

# Of every measurement, so that they all do the same work.
SEED = 1
PROMPT = "a lighthouse on a cliff at night, waves breaking below, long exposure photograph"

# How often memory is looked at.
INTERVAL = 0.02

# Anonymous and file-mapped resident memory in GB: what a process needs for itself, and pages of the weight files, which
# the kernel can drop at any time. None where the system does not tell.
Memory = tuple[float, float] | None


def resident(process: int | str = "self") -> Memory:
    """Return the memory of a process."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB$", status, re.MULTILINE))
    if len(found) < 2:  # an old kernel, or a process that has just ended
        return None
    return int(found["RssAnon"]) * 1024 / 1e9, int(found["RssFile"]) * 1024 / 1e9


class Watch:
    """Notes the peaks of this process's memory in each phase, from a thread of its own, for as long as it is open."""

    def __init__(self) -> None:
        self._peaks: dict[str, Memory] = {}
        self._phase = ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def phase(self, name: str) -> None:
        """Begin a phase; has the signature of `Flux.on_phase`."""
        self._look()  # so that a phase too short for the thread is seen, too
        self._phase = name
        self._look()

    def peak(self, phase: str) -> Memory:
        """Return the peaks of anonymous and of mapped memory in a phase."""
        return self._peaks.get(phase)

    def _look(self) -> None:
        with self._lock:
            now, peak = resident(), self._peaks.get(self._phase)
            self._peaks[self._phase] = highest(peak, now)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def highest(one: Memory, other: Memory) -> Memory:
    """Return the higher of each kind of memory."""
    return (max(one[0], other[0]), max(one[1], other[1])) if one and other else one or other


@dataclass(frozen=True)
class Finished:
    """A program that has run to a good end.

    Attributes:
        output: What it wrote to standard output.
        messages: What it wrote to standard error.
        seconds: From its start to its end.
        anonymous: The peak of its anonymous memory in GB; None where the system does not tell.
        resident: The peak of all its resident memory.
    """

    output: str
    messages: str
    seconds: float
    anonymous: float | None
    resident: float | None


def run_program(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Finished:
    """Run a program, and watch its memory from outside.

    Raises:
        FluxonnxError: It can't be started or it failed; the message is the last line it wrote, or how it ended.
    """
    start = time.perf_counter()
    anonymous = total = None
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise FluxonnxError(f"{command[0]} can't be started: {error.strerror or error}") from None
    with process:
        with suppress(OSError):  # on Linux: if memory runs out, this is the process to end, not its parent
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        try:
            while True:
                try:
                    output, messages = process.communicate(timeout=INTERVAL)
                    break
                except subprocess.TimeoutExpired:
                    if now := resident(process.pid):
                        anonymous, total = max(anonymous or 0.0, now[0]), max(total or 0.0, sum(now))
        except BaseException:
            process.kill()
            raise
    seconds = time.perf_counter() - start
    if process.returncode:
        raise FluxonnxError(_why(process.returncode, output, messages))
    return Finished(output, messages, seconds, anonymous, total)


def _why(code: int, output: str, messages: str) -> str:
    if code == -9:
        return "it was killed, most likely because memory ran out"
    lines = [line.strip() for line in (messages or output).splitlines() if line.strip()]
    return lines[-1] if lines and code > 0 else f"it ended with code {code}"


def measure_export(model: str, precision: str, flavour: str) -> dict[str, Any]:
    """Export anew; returns seconds, bytes written and peaks of memory."""
    from fluxonnx.export import export

    start = time.perf_counter()
    with Watch() as watch:
        watch.phase("export")
        reports = export(model, precision=precision, flavour=flavour, force=True)
        seconds = time.perf_counter() - start
        watch.phase("")
    written = sum(report.bytes_written for report in reports)
    return {"seconds": seconds, **_memory(watch.peak("export")), "bytes_written": written}


def measure_picture(
    model: str,
    width: int,
    height: int,
    steps: int | None,
    prompt: str,
    guidance: float | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Make a picture; returns seconds and peaks of memory per phase, seconds in all and per step after the first.

    `loading` is for `api.load`: precision, threads, ...
    """
    from fluxonnx import api

    ends: list[float] = []
    with api.load(model, **loading) as flux, Watch() as watch:
        flux.on_phase = watch.phase
        start = time.perf_counter()
        flux.generate(
            prompt,
            width,
            height,
            steps,
            SEED,
            guidance_scale=guidance,
            callback=lambda *_: ends.append(time.perf_counter()),
        )
        seconds = time.perf_counter() - start
    phases = {name: {"seconds": took, **_memory(watch.peak(name))} for name, took in flux.phases.seconds.items()}
    return {"seconds": seconds, "phases": phases, "steps": [after - before for before, after in pairwise(ends)]}


def measure_operators(
    model: str, width: int, height: int, steps: int | None, prompt: str, **loading: Any
) -> dict[str, Any]:
    """Make a picture under onnxruntime's profiler; returns a table of operator types per graph."""
    from fluxonnx import api
    from fluxonnx.runtime.profile import Profile

    with Profile() as profile:
        with api.load(model, **loading, profile=profile) as flux:
            flux.generate(prompt, width, height, steps, SEED)
        return {graph: [asdict(row) for row in rows] for graph, rows in profile.operators().items()}


def _memory(peak: Memory) -> dict[str, float | None]:
    anonymous, mapped = peak or (None, None)
    return {"anonymous_gb": anonymous, "mapped_gb": mapped}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "export": measure_export,
    "picture": measure_picture,
    "operators": measure_operators,
}


def main() -> int:
    """Measure what the first argument says and print what was found; returns the exit code."""
    job = json.loads(sys.argv[1])
    try:
        print(json.dumps(MEASUREMENTS[job.pop("measure")](**job)))
    except KeyboardInterrupt:
        return 130
    except MemoryError:
        print("out of memory", file=sys.stderr)
        return 1
    except FluxonnxError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
