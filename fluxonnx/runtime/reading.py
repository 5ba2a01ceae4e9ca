"""Bring weights into memory before they are needed.

Mapped weights are read page by page as they are used, which leaves a disk idle while something is computed, and the
processor idle while it reads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fluxonnx.checkpoint import read_header
from fluxonnx.errors import CheckpointError
from fluxonnx.machine import available_memory

# Linux reads no more at a time than a disk's read_ahead_kb, which is 128 unless someone changed it.
READ_AHEAD = 128 << 10
# What a thread goes through at a time.
CHUNK = 4 << 20
# One byte of so many is asked for, to find out whether a file is in memory; of which the system may have left out some.
SAMPLE = 1 << 20
LEFT_OUT = 0.05
# Bytes a second, below which reading is left to those who compute, and how often that is looked at, in seconds.
SLOWEST = 0.5e9
INTERVAL = 0.25


@dataclass(frozen=True)
class Span:
    """Bytes of a file, from `start` to `end`."""

    file: Path
    start: int
    end: int

    def pieces(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield starts and lengths of pieces of `size` bytes, and of what is left."""
        for start in range(self.start, self.end, size):
            yield start, min(size, self.end - start)


def whole(file: Path) -> Span:
    """Return all of a file; nothing of one that can't be read, which is reported by who needs it."""
    try:
        return Span(file, 0, file.stat().st_size)
    except OSError:
        return Span(file, 0, 0)


def rows_and_rest(file: Path, name: str, rows: Iterable[int]) -> list[Span]:
    """Return some rows of a tensor, and after them all of its safetensors file that is not this tensor.

    It is the whole file if that has no such tensor, or can't be read.
    """
    try:
        table = read_header(file).get(name)
    except CheckpointError:
        table = None
    if table is None:
        return [whole(file)]
    start, end, size = table.offset, table.offset + table.nbytes, table.nbytes // table.shape[0]
    found = [Span(file, start + int(row) * size, start + int(row + 1) * size) for row in rows]
    return [*found, Span(file, 0, start), Span(file, end, whole(file).end)]


def is_in_memory(spans: Sequence[Span]) -> bool:
    """Whether hardly anything has to be read from a disk, by samples; yes where the system does not tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    byte = bytearray(1)
    absent, allowed = 0, LEFT_OUT * _size(spans) / SAMPLE
    for span in spans:
        # a file that can't be read is reported by who needs it; and not every file system tells
        with suppress(OSError), span.file.open("rb") as file:
            for start, _ in span.pieces(SAMPLE):
                try:
                    os.preadv(file.fileno(), [byte], start, os.RWF_NOWAIT)
                except BlockingIOError:
                    absent += 1
                    if absent > allowed:
                        return False
    return True


def read_ahead(spans: Sequence[Span]) -> None:
    """Have the system read spans into memory in the background, one after the other; what is there costs nothing.

    Nothing is done where memory is short, or where the system has no such call.
    """
    if not hasattr(os, "posix_fadvise") or not _fit(spans):
        return

    def read() -> None:
        for span in spans:
            with suppress(OSError), span.file.open("rb") as file:
                for start, size in span.pieces(READ_AHEAD):
                    os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    threading.Thread(target=read, daemon=True).start()


class Touching:
    """Threads that go through spans which are in memory, or will be soon; a context manager that ends them.

    The first time that a processor sees memory into which something was read can be slow: in a virtual machine its
    host may have to provide each page, at 8 us for 4 KB. Threads that only read do this in half of the time that it
    takes when those that compute stumble over one page after the other, all of them over the same ones.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        """Start, unless memory is short."""
        pieces = [(span.file, *piece) for span in spans for piece in span.pieces(CHUNK)] if _fit(spans) else []
        self._left, self._done, self._lock = iter(pieces), 0, threading.Lock()
        self._over = threading.Event()
        count = min(os.cpu_count() or 1, len(pieces))
        self._threads = [threading.Thread(target=self._go, name="touching", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _go(self) -> None:
        buffer = memoryview(bytearray(CHUNK))
        for path, start, size in self._left:
            if self._over.is_set():
                return
            with suppress(OSError), path.open("rb", buffering=0) as file:
                file.seek(start)
                file.readinto(buffer[:size])
            with self._lock:
                self._done += size
        self._over.set()

    def wait(self) -> None:
        """Return when all was gone through, or when it turns out to be slow: then those who compute need not wait."""
        before = 0
        while self._threads and not self._over.wait(INTERVAL):
            if self._done - before < SLOWEST * INTERVAL:
                self._over.set()
            before = self._done

    def __enter__(self) -> Touching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def _fit(spans: Sequence[Span]) -> bool:
    return _size(spans) <= available_memory()


def _size(spans: Sequence[Span]) -> int:
    return sum(span.end - span.start for span in spans)
