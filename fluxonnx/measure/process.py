"""A program in a process of its own, and the peak memory of processes."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fluxonnx.errors import FluxonnxError

# Seconds between two readings of a process's memory.
INTERVAL = 0.02

# Anonymous and file-mapped resident memory in GB. Anonymous memory is what the process itself needs. Mapped memory is
# pages of the weight files, which the kernel can drop at any time. None where the system does not report them.
Memory = tuple[float, float] | None
ReadMemory = Callable[[int | str], Memory]


def resident(process: int | str = "self") -> Memory:
    """Return the resident memory of a process."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB$", status, re.MULTILINE))
    if len(found) < 2:  # an old kernel, or a process that has just ended
        return None
    return int(found["RssAnon"]) * 1024 / 1e9, int(found["RssFile"]) * 1024 / 1e9


class PeakMemory:
    """The peak memory of this process in each phase, sampled by a background thread while the context is open."""

    def __init__(self, read: ReadMemory = resident) -> None:
        """Start without a phase; `read` returns the memory of the process "self"."""
        self._read = read
        self._peaks: dict[str, Memory] = {}
        self._phase = ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self, phase: str) -> None:
        """Begin a phase."""
        self._sample()  # the phase that ends here may have been too short for the thread
        self._phase = phase
        self._sample()

    def of(self, phase: str) -> Memory:
        """Return the peaks of anonymous and of mapped memory in a phase."""
        return self._peaks.get(phase)

    def _sample(self) -> None:
        with self._lock:
            self._peaks[self._phase] = highest(self._peaks.get(self._phase), self._read("self"))

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample()

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def highest(one: Memory, other: Memory) -> Memory:
    """Return the higher value of each kind of memory."""
    return (max(one[0], other[0]), max(one[1], other[1])) if one and other else one or other


@dataclass(frozen=True)
class Finished:
    """A program that ended without an error.

    Attributes:
        output: What it wrote to standard output.
        messages: What it wrote to standard error.
        seconds: From its start to its end.
        anonymous: The peak of its anonymous memory in GB; None where the system does not report it.
        resident: The peak of its total resident memory in GB; likewise.
    """

    output: str
    messages: str
    seconds: float
    anonymous: float | None
    resident: float | None


def run_program(
    command: Sequence[str], environment: Mapping[str, str] | None = None, read: ReadMemory = resident
) -> Finished:
    """Run a program, and watch its memory from outside.

    Args:
        command: The program and its arguments.
        environment: Its environment variables; by default those of this process.
        read: Returns the memory of the process with a given number. It is called at least once.

    Raises:
        FluxonnxError: The program can't be started or it failed. The message is the last line that it wrote, or how it
            ended.
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
        with suppress(OSError):  # on Linux: if memory runs out, the kernel kills this process, not its parent
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        try:
            while True:
                if now := read(process.pid):
                    anonymous, total = max(anonymous or 0.0, now[0]), max(total or 0.0, sum(now))
                try:
                    output, messages = process.communicate(timeout=INTERVAL)
                    break
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            raise
    seconds = time.perf_counter() - start
    if process.returncode:
        raise FluxonnxError(_cause(process.returncode, output, messages))
    return Finished(output, messages, seconds, anonymous, total)


def _cause(code: int, output: str, messages: str) -> str:
    if code == -9:
        return "it was killed, most likely because memory ran out"
    lines = [line.strip() for line in (messages or output).splitlines() if line.strip()]
    return lines[-1] if lines and code > 0 else f"it ended with code {code}"
