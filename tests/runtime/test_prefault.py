"""Weights are brought into memory before they are needed."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.machine import usable_cores
from fluxonnx.runtime.prefault import (
    ABSENT,
    CHUNK,
    INTERVAL,
    READ_AHEAD,
    SAMPLE,
    SLOWEST,
    Prefault,
    Span,
    read_ahead,
    read_piece,
    resident,
    rows_and_rest,
    too_slow,
    whole_file,
)

PLENTY = 1 << 50


@pytest.fixture
def advised(monkeypatch) -> list[tuple[int, int]]:
    """Starts and lengths of what the system was advised to read."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("the system can't be told")
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, advice: found.append((start, length)))
    return found


class Disk:
    """Files of which some bytes are not in memory; records the bytes that were sampled."""

    def __init__(self, monkeypatch) -> None:
        if not hasattr(os, "RWF_NOWAIT"):
            pytest.skip("the system does not tell")
        self.absent_from: int | None = None
        self.error: OSError = BlockingIOError()
        self.asked: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "preadv", self.preadv)

    def preadv(self, fd: int, buffers: list, start: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        (buffer,) = buffers
        self.asked.append((start, len(buffer)))
        if self.absent_from is not None and start >= self.absent_from:
            raise self.error
        return len(buffer)


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def file_of(path: Path, size: int) -> Path:
    path.write_bytes(bytes(size))
    return path


def test_reads_ahead_in_pieces_that_the_system_accepts(tmp_path, advised):
    step = READ_AHEAD
    first, second = file_of(tmp_path / "a", 2 * step + 1), file_of(tmp_path / "b", 10)
    thread = read_ahead([whole_file(first), Span(second, 2, 6)], PLENTY)
    assert thread is not None
    thread.join()
    assert advised == [(0, step), (step, step), (2 * step, 1), (2, 4)]


def test_reads_nothing_where_memory_is_short(tmp_path, advised):
    """It would push out pages that are in use."""
    spans = [whole_file(file_of(tmp_path / "a", 1000))]
    assert read_ahead(spans, 999) is None
    assert advised == []
    touched: list[int] = []
    with Prefault(spans, 999, read=lambda file, start, buffer: touched.append(start)) as prefault:
        prefault.wait()
    assert touched == []


def test_missing_files_are_left_to_their_user(tmp_path, advised):
    spans = [whole_file(tmp_path / "missing"), Span(tmp_path / "gone", 0, 10)]
    thread = read_ahead(spans, PLENTY)
    assert thread is not None
    thread.join()
    with Prefault(spans, PLENTY, pause=threading.Event.wait) as prefault:
        prefault.wait()
    assert advised == []
    assert resident(spans)


def test_only_some_rows_of_a_table_are_read(tmp_path):
    arrays = {name: np.full((rows, 4), rows, np.float32) for name, rows in (("a", 3), ("table", 10), ("z", 5))}
    save_file(arrays, tmp_path / "w.safetensors")
    file = tmp_path / "w.safetensors"
    first, last, before, after = rows_and_rest(file, "table", np.array([2, 9]))
    table = read_header(file)["table"]
    assert (first.start, first.end) == (table.offset + 2 * 16, table.offset + 3 * 16)
    assert (last.start, last.end) == (table.offset + 9 * 16, table.offset + 10 * 16)
    assert (before.start, before.end, after.start) == (0, table.offset, table.offset + 160)
    assert after.end == file.stat().st_size
    assert rows_and_rest(file, "no such", [1]) == [whole_file(file)]
    assert rows_and_rest(file_of(tmp_path / "corrupt", 9), "table", [1]) == [Span(tmp_path / "corrupt", 0, 9)]


def test_samples_tell_whether_files_are_in_memory(tmp_path, disk):
    spans = [Span(file_of(tmp_path / "a", 10), 0, 3 * SAMPLE), whole_file(file_of(tmp_path / "b", 10))]
    assert resident(spans)
    assert disk.asked == [(0, 1), (SAMPLE, 1), (2 * SAMPLE, 1), (0, 1)]
    disk.absent_from = 2 * SAMPLE
    assert not resident(spans)
    disk.error = OSError(errno.EOPNOTSUPP, "the file system does not tell")
    assert resident(spans)


def test_a_few_samples_may_be_absent(tmp_path, disk):
    count = int(1 / ABSENT) + 1  # the fewest samples of which one may be absent
    spans = [Span(file_of(tmp_path / "a", 10), 0, count * SAMPLE)]
    disk.absent_from = (count - 1) * SAMPLE
    assert resident(spans)
    disk.absent_from = (count - 2) * SAMPLE
    assert not resident(spans)


def test_touches_everything_once(tmp_path):
    touched: list[tuple[Path, int, int]] = []
    a, b = tmp_path / "a", tmp_path / "b"

    def read(file: Path, start: int, buffer: memoryview) -> None:
        touched.append((file, start, len(buffer)))

    spans = [Span(a, 5, 5 + 4 * CHUNK), Span(b, 0, 10)]
    with Prefault(spans, PLENTY, read=read, pause=threading.Event.wait) as prefault:
        prefault.wait()
    assert sorted(touched) == [*((a, 5 + i * CHUNK, CHUNK) for i in range(4)), (b, 0, 10)]


def test_reads_the_right_bytes(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    buffer = bytearray(3)
    read_piece(tmp_path / "a", 40, memoryview(buffer))
    assert buffer == bytes([40, 41, 42])
    read_piece(tmp_path / "missing", 40, memoryview(buffer))
    assert buffer == bytes([40, 41, 42])


def test_rate_that_is_worth_waiting_for():
    assert too_slow(0, INTERVAL)
    assert too_slow(int(SLOWEST * INTERVAL) - 1, INTERVAL)
    assert not too_slow(int(SLOWEST * INTERVAL), INTERVAL)


class StuckDisk:
    """Reads that do not end until they are released."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.reads: list[int] = []

    def read(self, file: Path, start: int, buffer: memoryview) -> None:
        self.reads.append(start)
        self.released.wait()


def test_a_slow_disk_is_not_waited_for(tmp_path):
    """`wait` returns although nothing was read; then every thread ends after the piece that it is at."""
    disk = StuckDisk()
    with Prefault([Span(tmp_path / "a", 0, 1 << 38)], PLENTY, read=disk.read, pause=threading.Event.is_set) as prefault:
        prefault.wait()
        disk.released.set()
    assert len(disk.reads) <= usable_cores()
    assert not prefault_threads()


def test_a_fast_disk_is_waited_for(tmp_path):
    """As long as enough is read between two looks at the progress."""
    threads, enough, rounds = usable_cores(), 1 + int(SLOWEST * INTERVAL) // CHUNK, 3
    arrivals, tickets = threading.Semaphore(0), threading.Semaphore(0)
    looks: list[int] = []

    def read(file: Path, start: int, buffer: memoryview) -> None:
        arrivals.release()  # what this thread read before is counted
        tickets.acquire()

    def pause(over: threading.Event) -> bool:
        """Let the threads read just enough, and wait until they come for more."""
        looks.append(enough)
        if len(looks) > rounds:
            tickets.release(pieces)
            return over.wait()
        tickets.release(enough)
        for _ in range(enough + (threads if len(looks) == 1 else 0)):
            arrivals.acquire()
        return False

    pieces = rounds * enough + threads
    with Prefault([Span(tmp_path / "a", 0, pieces * CHUNK)], PLENTY, read=read, pause=pause) as prefault:
        prefault.wait()
    assert len(looks) == rounds + 1


def test_an_error_ends_it(tmp_path):
    disk = StuckDisk()
    with pytest.raises(KeyError), Prefault([Span(tmp_path / "a", 0, 1 << 40)], PLENTY, read=disk.read):
        disk.released.set()
        raise KeyError
    assert not prefault_threads()


def prefault_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefault"]
