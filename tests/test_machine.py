"""What is asked of the system."""

from __future__ import annotations

import os
import threading

import pytest

from fluxonnx import machine


@pytest.fixture
def advised(monkeypatch) -> list[tuple[int, int]]:
    """Starts and lengths of what the system was advised to read."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("the system can't be told")
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, advice: found.append((start, length)))
    return found


def finish() -> None:
    for thread in threading.enumerate():
        if thread.daemon and thread is not threading.current_thread():
            thread.join(10)


def test_reads_files_ahead_whole_in_pieces_that_the_system_takes(tmp_path, advised):
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_bytes(bytes(machine.READ_AHEAD * 2 + 1))
    files[1].write_bytes(bytes(10))
    machine.read_ahead(files)
    finish()
    step = machine.READ_AHEAD
    assert advised == [(0, step), (step, step), (2 * step, step), (0, step)]


def test_reads_nothing_ahead_where_memory_is_short(tmp_path, advised, monkeypatch):
    """It would push out what is in use."""
    (tmp_path / "a").write_bytes(bytes(1000))
    monkeypatch.setattr(machine, "available_memory", lambda: 999)
    machine.read_ahead([tmp_path / "a"])
    machine.read_ahead([tmp_path / "missing"])
    finish()
    assert advised == []
