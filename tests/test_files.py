"""Nothing half-written has a final name, and nothing of it stays."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings

import pytest

from fluxonnx.files import atomic_folder, atomic_write, exclusive, probe, resumable_write

posix = pytest.mark.skipif(os.name != "posix", reason="locks and signals are others elsewhere")


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


@posix
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


def test_what_is_being_written_is_not_swept(tmp_path):
    """Whatever process number the writer has: in another container it may be that of nobody here."""
    path = tmp_path / "a"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert path.read_text() == "first"


@posix
def test_leftover_of_a_process_with_the_same_number_is_swept(tmp_path):
    """In a container that is always 1."""
    leftover = tmp_path / f".a.{os.getpid()}.0123abcd.tmp"
    leftover.write_text("of a process that was killed")
    folder = tmp_path / f".a.{os.getpid()}.4567abcd.tmp"
    (folder / "inside").mkdir(parents=True)
    with atomic_write(tmp_path / "a"):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["n" * 244, "猫" * 80 + ".png", "n" * 255])
def test_long_names(tmp_path, name):
    path = tmp_path / name
    with atomic_write(path) as temporary:
        temporary.write_text("x")
    probe(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(params=["ENOTSUP", "ENOLCK", "ENOSYS"])
def no_locks(request, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(getattr(errno, request.param), "synthetic")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_file_systems_without_locks(no_locks, tmp_path):
    """They are no other process: everything goes on, but what may be another's file is left for a day."""
    path, header = tmp_path / "a", b"header"
    young, old = tmp_path / ".a.1.tmp", tmp_path / ".a.2.tmp"
    for leftover in (young, old):
        leftover.touch()
    os.utime(old, (0, 0))
    with exclusive(tmp_path), exclusive(tmp_path), resumable_write(path, header) as file:
        file.write(b"data")
    assert path.read_bytes() == b"headerdata"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == [young, path]


HOLD = """
import sys
from pathlib import Path
from fluxonnx.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
    (Path(sys.argv[1]) / "done").touch()
"""


@posix
def test_others_are_waited_for(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"in\n"
        with exclusive(tmp_path, on_wait=other.stdin.close):
            assert (tmp_path / "done").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["done"]


@posix
def test_waiting_is_told_in_one_line(tmp_path):
    """A user may see nothing for minutes while another process exports 8 GB."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"in\n"
        messages = []
        with warnings.catch_warnings():
            warnings.simplefilter("always")

            def show(message, *_):
                messages.append(str(message))
                other.stdin.close()

            warnings.showwarning = show
            with exclusive(tmp_path):
                assert (tmp_path / "done").exists()
    assert messages == [f"another process is writing to {tmp_path}: waiting until it has finished"]


@posix
def test_a_warning_that_is_an_error_leaves_the_lock_alone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []  # noqa: PTH112, PTH208
        with warnings.catch_warnings(), pytest.raises(UserWarning, match="another process"):
            warnings.simplefilter("error")
            with exclusive(tmp_path):
                pass
        after = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []  # noqa: PTH112, PTH208
        assert len(after) == len(before)
        other.stdin.close()
    with exclusive(tmp_path):
        assert (tmp_path / "done").exists()


# Locks as Windows has them: of bytes, by a function that fails at once, of files that can't be removed while they are
# open. The bytes are locked by POSIX's own means, so that processes do see each other.
WINDOWS = """
import sys, types
import fcntl as posix
def locking(descriptor, mode, count):
    assert mode == 2 and count == 1
    try:
        posix.lockf(descriptor, posix.LOCK_EX | posix.LOCK_NB, count, 0, 1)  # from the current position on
    except BlockingIOError as error:
        raise PermissionError(13, "Permission denied") from error
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
sys.modules["fcntl"] = None
"""
WAIT = """
import sys
from pathlib import Path
from fluxonnx.files import atomic_folder, atomic_write, exclusive, remove_leftovers, resumable_write
root = Path(sys.argv[1])
with exclusive(root, on_wait=lambda: print("waits", flush=True)), exclusive(root):
    print("done" if (root / "done").exists() else "too early", flush=True)
    with resumable_write(root / "weights", b"header") as file:
        file.write(b"data")
    with atomic_write(root / "graph") as temporary:
        temporary.write_text("x")
    with atomic_folder(root / "folder") as temporary:
        remove_leftovers(root, ".*.tmp")
        (temporary / "x").touch()
"""


@posix
def test_locks_of_windows(tmp_path):
    """As far as they can be tried elsewhere: exports wait for each other, and files get their names."""
    start = [sys.executable, "-c"]
    with subprocess.Popen(
        [*start, WINDOWS + HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline() == b"in\n"
        with subprocess.Popen([*start, WINDOWS + WAIT, str(tmp_path)], stdout=subprocess.PIPE) as second:
            assert second.stdout.readline() == b"waits\n"
            first.stdin.close()
            assert second.stdout.readline() == b"done\n"
            assert second.stdout.read() == b""
    assert (first.returncode, second.returncode) == (0, 0)
    assert (tmp_path / "weights").read_bytes() == b"headerdata"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "folder", "graph", "weights"]


@posix
def test_killed_holder_is_not_waited_for(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        other.kill()
    waited = []
    with exclusive(tmp_path, on_wait=lambda: waited.append(1)):
        assert not waited
    assert [item.name for item in tmp_path.iterdir()] == []


@posix
def test_who_has_a_file_open_keeps_it(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"headerold")
    with path.open("rb") as mapped:
        with resumable_write(path, b"header", resume=False) as file:
            file.write(b"new")
        assert mapped.read() == b"headerold"
    assert path.read_bytes() == b"headernew"


def test_folder_that_another_process_made(tmp_path):
    path = tmp_path / "model"
    with atomic_folder(path) as temporary:
        (temporary / "mine").touch()
        path.mkdir()
        (path / "theirs").touch()
    assert [file.name for file in path.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_links_are_not_followed_to_what_is_written(tmp_path):
    """A stranger's model directory may hold any link under the names that are known to be used."""
    folder, target = tmp_path / "model", tmp_path / "mine"
    folder.mkdir()
    for existing in (False, True):
        if existing:
            target.write_text("mine")
        for name in (".fluxonnx.lock", ".weights.partial"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)
        with exclusive(folder), exclusive(folder):
            pass
        with pytest.raises(OSError, match="symbolic link") as caught, resumable_write(folder / "weights", b"header"):
            pass
        assert caught.value.filename == str(folder / "weights")
        assert target.exists() == existing
    assert target.read_text() == "mine"
