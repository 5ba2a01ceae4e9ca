"""The lines of earlier sessions."""

from __future__ import annotations

import stat
import subprocess
import sys

import pytest

pytest.importorskip("prompt_toolkit")

from fluxonnx.errors import FluxonnxError
from fluxonnx.terminal.history import MOST_BYTES, open_history, user_state

posix = pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")


def test_lines_come_back_the_last_one_first(tmp_path):
    history = open_history(tmp_path / "state")
    for line in ("a cat", "two\nlines", "☂ \udc80"):
        history.store_string(line)
    assert list(open_history(tmp_path / "state").load_history_strings())[1:] == ["two\nlines", "a cat"]


@posix
def test_only_their_user_can_read_them(tmp_path):
    folder = tmp_path / "state"
    open_history(folder).store_string("a secret")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "history").stat().st_mode) == 0o600
    (folder / "history").chmod(0o644)
    open_history(folder)
    assert stat.S_IMODE((folder / "history").stat().st_mode) == 0o600


def test_sessions_at_once_do_not_mix_their_lines(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fluxonnx.terminal.history import open_history; "
        "history = open_history(Path(sys.argv[1])); "
        "[history.store_string(f'{sys.argv[2]} {i} ' + 'x' * 5000) for i in range(50)]"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    found = sorted(line.removesuffix("x" * 5000) for line in open_history(tmp_path).load_history_strings())
    assert found == sorted(f"{name} {i} " for name in "ab" for i in range(50))


def test_a_long_file_is_cut_to_its_last_lines(tmp_path):
    history = open_history(tmp_path)
    for i in range(12):
        history.store_string(f"{i} " + "x" * (MOST_BYTES // 10))
    found = list(open_history(tmp_path).load_history_strings())
    assert (tmp_path / "history").stat().st_size <= MOST_BYTES
    assert [line.split()[0] for line in found] == ["11", "10", "9", "8"]


def test_a_damaged_file_is_no_failure(tmp_path):
    (tmp_path / "history").write_bytes(bytes(range(256)) * 10)
    open_history(tmp_path).store_string("a cat")
    assert next(iter(open_history(tmp_path).load_history_strings())) == "a cat"


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FluxonnxError, match=r"lines are not kept: .*file/below"):
        open_history(tmp_path / "file" / "below")


def test_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert user_state() == tmp_path / "fluxonnx"
