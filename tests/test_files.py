"""Nothing half-written has a final name, and nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from fluxonnx.files import atomic_write


def test_success_replaces(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="processes are killed otherwise elsewhere")
def test_what_a_killed_process_left_is_swept(tmp_path):
    path = tmp_path / "a[1].bin"
    code = (
        "import os, sys, signal; from pathlib import Path; from fluxonnx.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as t: t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
    assert list(tmp_path.iterdir()) == [path]
