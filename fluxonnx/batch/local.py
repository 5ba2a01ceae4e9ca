"""The engine of one machine: this process, or several that share the mapped weights and divide the cores."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from fluxonnx.batch.painter import PROMPTS_AHEAD, Painter
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.machine import MOST_THREADS, usable_cores

Values = Mapping[str, Any]
Result = Mapping[str, Any]

# The folder that `fluxonnx` is imported from.
PACKAGE = str(Path(__file__).parents[2])
# Seconds in which a process that has closed its output ends.
END_TIME = 10
# A row in whose time the worker was killed is tried once more: memory may have been short for another reason.
MOST_DEATHS = 2


def engine(workers: int = 1) -> Callable[[Painter, Sequence[Values]], Generator[Result, None, None]]:
    """Return the engine.

    One worker is this process. Each of several is a process of its own, which gets its share of the cores that this
    process may use as threads, unless the painter says how many.

    Raises:
        UsageError: The number of workers is impossible.
    """
    if not 1 <= workers <= MOST_THREADS:
        raise UsageError(f"workers is {workers}, but must be from 1 to {MOST_THREADS}")
    return _here if workers == 1 else partial(_in_processes, workers=workers)


def _here(painter: Painter, rows: Sequence[Values]) -> Generator[Result, None, None]:
    yield from painter.paint(rows)


def share_of_cores(workers: int) -> int:
    """Return the threads of each of so many workers."""
    return max(1, usable_cores() // workers)


def _in_processes(painter: Painter, rows: Sequence[Values], workers: int) -> Generator[Result, None, None]:
    workers = min(workers, len(rows))
    if painter.threads is None:
        painter = replace(painter, threads=share_of_cores(workers))
    todo = Todo(rows, workers)
    # Bounded, so that workers wait where pictures can't be written as fast as they are made.
    done: queue.Queue[Result | BaseException | None] = queue.Queue(2 * workers)
    running = [Worker(painter, todo, done) for _ in range(workers)]
    try:
        left = workers
        while left:
            try:
                found = done.get(timeout=1)
            except queue.Empty:  # a signal that comes just before a wait does not interrupt it
                continue
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        todo.stop()
        for worker in running:
            worker.kill()
        while any(worker.thread.is_alive() for worker in running):  # one may wait to hand over a result
            with suppress(queue.Empty):
                done.get(timeout=0.1)


class Todo:
    """The rows that no worker has yet, and how often one has cost a worker its life; for several threads."""

    def __init__(self, rows: Sequence[Values], workers: int) -> None:
        """All rows, in their order."""
        self._rows = deque(rows)
        self._workers = workers
        self._deaths: dict[int, int] = {}
        self._lock = threading.Lock()
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether nothing more is to be made."""
        return self._stopped

    def take(self) -> list[Values]:
        """Return the next rows for a worker: fewer towards the end, so that all workers end together."""
        with self._lock:
            if self._stopped:
                return []
            count = min(PROMPTS_AHEAD, max(1, len(self._rows) // (2 * self._workers)))
            return [self._rows.popleft() for _ in range(min(count, len(self._rows)))]

    def give_back(self, rows: Sequence[Values]) -> Values | None:
        """Take back the rows of a worker that has died, the first of which it was working on.

        Returns:
            That one, if it is not worth another try.
        """
        with self._lock:
            first, *others = rows
            deaths = self._deaths[first["row"]] = self._deaths.get(first["row"], 0) + 1
            self._rows.extendleft(reversed(others if deaths >= MOST_DEATHS else rows))
            return first if deaths >= MOST_DEATHS else None

    def stop(self) -> None:
        """Hand out no more rows."""
        with self._lock:
            self._stopped = True


class Worker:
    """A process that paints, and the thread that feeds it; another process takes the place of one that dies."""

    def __init__(self, painter: Painter, todo: Todo, done: queue.Queue[Result | BaseException | None]) -> None:
        """Start both."""
        self._painter, self._todo, self._done = painter, todo, done
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def kill(self) -> None:
        """End the process at once."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def _run(self) -> None:
        try:
            while rows := self._todo.take():
                self._feed(rows)
            self._done.put(None)
        except BaseException as error:
            self._done.put(error)
        finally:
            with self._lock:
                if self._process is not None:
                    self._process.kill()
                    self._process.wait()

    def _feed(self, rows: list[Values]) -> None:
        """Have rows painted, and hand over their results."""
        left = deque(rows)
        try:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            _send(process.stdin, rows)
            while left:
                result = pickle.load(process.stdout)
                left.popleft()
                self._done.put(result)
        except (EOFError, OSError, pickle.UnpicklingError):
            if self._todo.stopped:
                return
            how = self._ended()
            if (row := self._todo.give_back(list(left))) is not None:
                error = f"the worker that drew it {how}, and so did the next one"
                self._done.put({"row": row["row"], "error": error})

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._process is None:
                if self._todo.stopped:
                    raise EOFError
                # -P: files in the current folder must not take the place of modules.
                command = [sys.executable, "-P", "-m", "fluxonnx.batch.worker"]
                paths = [PACKAGE, *filter(None, [os.environ.get("PYTHONPATH")])]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
                try:
                    self._process = subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                    )
                except OSError as error:
                    raise FluxonnxError(f"a worker can't be started: {error.strerror or error}") from None
                assert self._process.stdin is not None
                _send(self._process.stdin, self._painter)
            return self._process

    def _ended(self) -> str:
        """Return how the process ended."""
        with self._lock:
            assert self._process is not None
            try:
                code = self._process.wait(END_TIME)
            except subprocess.TimeoutExpired:
                self._process.kill()
                code = self._process.wait()
            self._process = None
        return "was killed (most likely because memory ran out)" if code == -9 else f"ended with code {code}"


def _send(stream: IO[bytes], value: object) -> None:
    pickle.dump(value, stream)
    stream.flush()
