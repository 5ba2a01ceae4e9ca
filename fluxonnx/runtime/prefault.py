"""Bring weights into memory before they are needed.

Mapped weights are read page by page as they are used. The disk is then idle while something is computed, and the
processor while something is read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.errors import CheckpointError
from fluxonnx.machine import usable_cores
from fluxonnx.runtime.memory import fits

# The most that Linux reads ahead at a time: a disk's read_ahead_kb, which is 128 unless someone changed it.
READ_AHEAD = 128 << 10
# What a thread reads at a time.
CHUNK = 4 << 20
# Whether a file is in memory is found out by one byte per SAMPLE. ABSENT is the share that may be missing, because the
# system leaves out pages when it reads ahead.
SAMPLE = 1 << 20
ABSENT = 0.05
# Below this rate, in bytes per second, the threads that compute do not wait for prefaulting. It is checked at an
# interval, in seconds.
SLOWEST = 0.5e9
INTERVAL = 0.25


@dataclass(frozen=True)
class Span:
    """Bytes of a file, from `start` to `end`."""

    file: Path
    start: int
    end: int

    def pieces(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield starts and lengths of pieces of `size` bytes; the last one may be shorter."""
        for start in range(self.start, self.end, size):
            yield start, min(size, self.end - start)


def whole_file(file: Path) -> Span:
    """Return a span over a file; an empty one if it can't be read, which its user will report."""
    try:
        return Span(file, 0, file.stat().st_size)
    except OSError:
        return Span(file, 0, 0)


def rows_and_rest(file: Path, name: str, rows: Iterable[int]) -> list[Span]:
    """Return spans over some rows of a tensor, then over all of its safetensors file except this tensor.

    If the file has no such tensor, or can't be read, the result is the whole file.
    """
    try:
        table = read_header(file).get(name)
    except CheckpointError:
        table = None
    if table is None:
        return [whole_file(file)]
    start, end, size = table.offset, table.offset + table.nbytes, table.nbytes // table.shape[0]
    found = [Span(file, start + int(row) * size, start + int(row + 1) * size) for row in rows]
    return [*found, Span(file, 0, start), Span(file, end, whole_file(file).end)]


def resident(spans: Sequence[Span]) -> bool:
    """Whether nearly all bytes are in memory, judged by samples; True where the system does not tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    byte = bytearray(1)
    absent, allowed = 0, ABSENT * _size(spans) / SAMPLE
    for span in spans:
        # a file that can't be read is reported by its user; and some file systems do not tell
        with suppress(OSError), span.file.open("rb") as file:
            for start, _ in span.pieces(SAMPLE):
                try:
                    os.preadv(file.fileno(), [byte], start, os.RWF_NOWAIT)
                except BlockingIOError:
                    absent += 1
                    if absent > allowed:
                        return False
    return True


def read_ahead(spans: Sequence[Span], free: int) -> threading.Thread | None:
    """Have the system read spans into memory in the background, in this order; resident pages cost nothing.

    Args:
        spans: What to read.
        free: Bytes of free memory.

    Returns:
        The thread that asks for it; None where memory is short, or where the system has no such call.
    """
    if not hasattr(os, "posix_fadvise") or not fits(_size(spans), free):
        return None

    def read() -> None:
        for span in spans:
            with suppress(OSError), span.file.open("rb") as file:
                for start, size in span.pieces(READ_AHEAD):
                    os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=read, name="read ahead", daemon=True)
    thread.start()
    return thread


def read_piece(file: Path, start: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of a file from `start` on; a file that can't be read is reported by its user."""
    with suppress(OSError), file.open("rb", buffering=0) as opened:
        opened.seek(start)
        opened.readinto(buffer)


def pause(over: threading.Event) -> bool:
    """Wait until the event is set, but at most `INTERVAL`; return whether it is."""
    return over.wait(INTERVAL)


def too_slow(size: int, seconds: float) -> bool:
    """Whether `size` bytes in `seconds` are below the rate that is worth waiting for."""
    return size < SLOWEST * seconds


class Prefault:
    """Touch pages of mapped files from background threads; a context manager that ends them.

    The first access to memory into which a file was read can be slow: in a virtual machine, the host may have to
    provide each page, at 8 us for 4 KB. Threads that only read take half of the time that it takes when the threads
    that compute run into one missing page after the other, all of them into the same ones.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        free: int,
        read: Callable[[Path, int, memoryview], None] = read_piece,
        pause: Callable[[threading.Event], bool] = pause,
    ) -> None:
        """Start the threads, unless memory is short.

        Args:
            spans: What to touch.
            free: Bytes of free memory.
            read: Reads bytes of a file from a start into a buffer.
            pause: Waits between two checks of progress; returns whether the event is set.
        """
        pieces = [(span.file, *piece) for span in spans for piece in span.pieces(CHUNK)]
        if not fits(_size(spans), free):
            pieces = []
        self._read, self._pause = read, pause
        self._left, self._done, self._lock = iter(pieces), 0, threading.Lock()
        self._over = threading.Event()
        count = min(usable_cores(), len(pieces))
        self._threads = [threading.Thread(target=self._run, name="prefault", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        buffer = memoryview(bytearray(CHUNK))
        for file, start, size in self._left:
            if self._over.is_set():
                return
            self._read(file, start, buffer[:size])
            with self._lock:
                self._done += size
        self._over.set()

    def wait(self) -> None:
        """Return when everything was touched, or when the disk turns out to be too slow to wait for."""
        before = 0
        while self._threads and not self._pause(self._over):
            if too_slow(self._done - before, INTERVAL):
                self._over.set()
            before = self._done

    def __enter__(self) -> Prefault:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def _size(spans: Sequence[Span]) -> int:
    return sum(span.end - span.start for span in spans)
