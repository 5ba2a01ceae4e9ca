"""Weights are brought into memory before they are needed."""

from __future__ import annotations

import errno
import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fluxonnx.runtime import reading
from fluxonnx.runtime.reading import Span, Touching, is_in_memory, read_ahead, rows_and_rest, whole


@pytest.fixture
def advised(monkeypatch) -> list[tuple[int, int]]:
    """Starts and lengths of what the system was advised to read."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("the system can't be told")
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, advice: found.append((start, length)))
    return found


class Disk:
    """Files of which some bytes are not in memory; remembers what was asked for."""

    def __init__(self, monkeypatch) -> None:
        if not hasattr(os, "RWF_NOWAIT"):
            pytest.skip("the system does not tell")
        self.absent_from: int | None = None
        self.error = BlockingIOError()
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


def finish() -> None:
    for thread in threading.enumerate():
        if thread.daemon and thread is not threading.current_thread():
            thread.join(10)


def file_of(path: Path, size: int) -> Path:
    path.write_bytes(bytes(size))
    return path


def test_reads_ahead_all_in_pieces_that_the_system_takes(tmp_path, advised):
    step = reading.READ_AHEAD
    first, second = file_of(tmp_path / "a", 2 * step + 1), file_of(tmp_path / "b", 10)
    read_ahead([whole(first), Span(second, 2, 6)])
    finish()
    assert advised == [(0, step), (step, step), (2 * step, 1), (2, 4)]


def test_reads_nothing_where_memory_is_short(tmp_path, advised, monkeypatch):
    """It would push out what is in use."""
    spans = [whole(file_of(tmp_path / "a", 1000))]
    monkeypatch.setattr(reading, "available_memory", lambda: 999)
    read_ahead(spans)
    with Touching(spans) as touching:
        assert not touching._threads
        touching.wait()
    finish()
    assert advised == []


def test_what_is_missing_is_left_to_who_needs_it(tmp_path, advised):
    spans = [whole(tmp_path / "missing")]
    read_ahead(spans)
    with Touching(spans) as touching:
        touching.wait()
    finish()
    assert is_in_memory(spans)
    assert advised == []


def test_a_table_is_read_only_where_it_is_needed(tmp_path):
    arrays = {name: np.full((rows, 4), rows, np.float32) for name, rows in (("a", 3), ("table", 10), ("z", 5))}
    save_file(arrays, tmp_path / "w.safetensors")
    file = tmp_path / "w.safetensors"
    header = reading.read_header(file)
    first, last, before, after = rows_and_rest(file, "table", np.array([2, 9]))
    table = header["table"]
    assert (first.start, first.end) == (table.offset + 2 * 16, table.offset + 3 * 16)
    assert (last.start, last.end) == (table.offset + 9 * 16, table.offset + 10 * 16)
    assert (before.start, before.end, after.start) == (0, table.offset, table.offset + 160)
    assert after.end == file.stat().st_size
    assert rows_and_rest(file, "no such", [1]) == [whole(file)]
    assert rows_and_rest(file_of(tmp_path / "corrupt", 9), "table", [1]) == [Span(tmp_path / "corrupt", 0, 9)]


def test_knows_what_is_in_memory(tmp_path, disk, monkeypatch):
    spans = [Span(file_of(tmp_path / "a", 10), 0, 3 * reading.SAMPLE), whole(file_of(tmp_path / "b", 10))]
    assert is_in_memory(spans)
    assert disk.asked == [(0, 1), (reading.SAMPLE, 1), (2 * reading.SAMPLE, 1), (0, 1)]
    disk.absent_from = 2 * reading.SAMPLE
    assert not is_in_memory(spans)
    monkeypatch.setattr(reading, "LEFT_OUT", 0.4)  # one of three
    assert is_in_memory(spans)
    disk.error = OSError(errno.EOPNOTSUPP, "the file system does not tell")
    assert is_in_memory(spans)


@pytest.fixture
def gone_through(monkeypatch) -> list[tuple[int, int]]:
    """Starts and lengths of what was read."""
    found: list[tuple[int, int]] = []

    class File(io.BytesIO):
        def readinto(self, buffer) -> int:
            found.append((self.tell(), len(buffer)))
            return len(buffer)

    monkeypatch.setattr(reading, "available_memory", lambda: 1 << 50)
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: File())
    return found


def test_touches_everything_once(tmp_path, gone_through, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    step, file = reading.CHUNK, tmp_path / "a"
    with Touching([Span(file, 5, 5 + 4 * step), Span(file, 0, 10)]) as touching:
        touching.wait()
    assert sorted(gone_through) == sorted([*((5 + i * step, step) for i in range(4)), (0, 10)])


def test_a_slow_disk_is_not_waited_for(tmp_path, gone_through, monkeypatch):
    monkeypatch.setattr(reading, "SLOWEST", 1e15)
    monkeypatch.setattr(reading, "INTERVAL", 0.01)
    with Touching([Span(tmp_path / "a", 0, 1 << 38)]) as touching:
        touching.wait()
    assert len(gone_through) < 1 << 16


def test_touching_ends_with_what_it_was_for(tmp_path, gone_through):
    with pytest.raises(KeyError), Touching([Span(tmp_path / "a", 0, 1 << 40)]):
        raise KeyError
    assert len(gone_through) < 1 << 18
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("touching")]
