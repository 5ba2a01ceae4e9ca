"""Writing files so that no half-written file ever has its final name, and processes wait for each other."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fluxonnx.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Names of at most this many bytes are part of the temporary name; others are replaced by a digest. File systems allow
# 255 bytes, encrypted ones 143.
LONGEST_PART = 100

# Where locks can't tell whether a temporary file is still being written: the age in seconds at which it is not.
ABANDONED_AFTER = 24 * 60 * 60

LOCK_NAME = ".fluxonnx.lock"

_BINARY = getattr(os, "O_BINARY", 0)
_held = threading.local()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; it becomes `path` if the block succeeds and is removed otherwise.

    The file exists and is empty; it is to be written in place, because its lock tells other processes that it is still
    in use. Temporary files of killed processes are removed, too: they can be gigabytes.
    """
    sweep(path)
    temporary, descriptor = _claim(path, _make_file)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path`, unless another process has made that meanwhile."""
    sweep(path)
    temporary, descriptor = _claim(path, _make_folder)
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def resumable_write(path: Path, header: bytes, resume: bool = True) -> Iterator[BinaryIO]:
    """Yield a file that starts with `header` and becomes `path` if the block succeeds; otherwise it is kept.

    The file may hold what an interrupted run with the same header wrote, if `resume` allows; the position is at its
    end. Another process that writes the same file is waited for. `path` itself is never written to: who has opened it
    keeps what was in it.
    """
    partial = path.with_name(f".{path.name}.partial")
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
        _lock(descriptor, wait=True)
        if _is_at(descriptor, partial):
            break
        os.close(descriptor)  # the other process has finished it
    with os.fdopen(descriptor, "r+b") as file:
        if not resume or file.read(len(header)) != header:
            file.seek(0)
            file.truncate()
            file.write(header)
        file.seek(0, os.SEEK_END)
        yield file
        file.truncate()
        if fcntl is not None:  # before others get the lock
            file.flush()
            os.replace(partial, path)
    if fcntl is None:
        os.replace(partial, path)


@contextmanager
def exclusive(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Let one thread of all processes in at a time; it may enter again.

    A folder that can't be written to, and a file system without locks, let everyone in.

    Args:
        folder: The folder that is to be changed.
        on_wait: Called if another one has to be waited for.
    """
    folders: set[Path] = _held.__dict__.setdefault("folders", set())
    key = folder.resolve()
    if key in folders:
        yield
        return
    lock = folder / LOCK_NAME
    descriptor = _acquire(lock, on_wait)
    folders.add(key)
    try:
        yield
    finally:
        folders.discard(key)
        if descriptor is not None:
            # Removed while it is locked: whoever waits for it finds that it is gone, and makes another.
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)


def _acquire(lock: Path, on_wait: Callable[[], None] | None) -> int | None:
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            try:
                descriptor = os.open(lock, os.O_RDONLY)  # of another user
            except OSError:
                return None
        if _lock(descriptor) is False:
            if on_wait:
                on_wait()
            _lock(descriptor, wait=True)
        if _is_at(descriptor, lock):
            return descriptor
        os.close(descriptor)


def _lock(descriptor: int, wait: bool = False) -> bool | None:
    """Lock a file or folder for its descriptor: False if another one holds the lock, None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # ENOTSUP, ENOLCK, ENOSYS, EBADF: network and user-space file systems
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a descriptor's file still has the name `path`."""
    if fcntl is None:
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _claim(path: Path, make: Callable[[Path], int]) -> tuple[Path, int | None]:
    """Make a temporary file or folder that is locked before anyone takes it for a leftover."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(6)}.tmp")
        if fcntl is None and make is _make_folder:  # folders have no descriptors there
            temporary.mkdir()
            return temporary, None
        descriptor = make(temporary)
        if fcntl is None:  # where a file that is open can't be renamed
            os.close(descriptor)
            return temporary, None
        if _lock(descriptor) is not False and _is_at(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)


def _make_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)


def _make_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _prefix(path: Path) -> str:
    """Return what the temporary names of `path` begin with."""
    name = os.fsencode(path.name)
    return f".{path.name if len(name) <= LONGEST_PART else hashlib.sha256(name).hexdigest()[:32]}."


def sweep(path: Path) -> None:
    """Remove the temporary files and folders of `path` that nobody writes any more."""
    remove_leftovers(path.parent, f"{glob.escape(_prefix(path))}*.tmp")


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders whose names match and that nobody holds a lock on."""
    with suppress(OSError):
        for leftover in list(folder.glob(pattern)):
            with suppress(OSError):
                _remove_leftover(leftover)


def _remove_leftover(path: Path) -> None:
    found = path.lstat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return
    abandoned: bool | None = None
    descriptor = None
    try:
        if fcntl is not None:
            descriptor = os.open(path, os.O_RDONLY)
            abandoned = _lock(descriptor)
        if abandoned is None:
            abandoned = time.time() - found.st_mtime > ABANDONED_AFTER
        if abandoned and stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path)
        elif abandoned:
            path.unlink()
    finally:
        if descriptor is not None:
            os.close(descriptor)


def require_text(path: Path) -> None:
    """Check that a model directory has a name which ONNX can be told.

    Raises:
        CheckpointError: It has bytes that are not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = str(path).encode(errors="replace").decode()
        raise CheckpointError(
            f"the name {shown} has bytes that are not UTF-8, which ONNX can't open: rename the folder"
        ) from None


def probe(path: Path) -> None:
    """Find out whether a file could be written at `path`, without leaving or changing anything.

    Raises:
        OSError: It could not.
    """
    with suppress(InterruptedError), atomic_write(path.with_name(f"{path.name}.probe")) as temporary:
        temporary.touch()
        raise InterruptedError  # so that nothing is renamed


def describe_os_error(error: OSError, what: object, otherwise: str = "choose another with -o") -> str:
    """Say in one line why writing failed and what to do about it.

    Args:
        error: The system's error.
        what: The file, or a word for it.
        otherwise: The alternative to changing permissions.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {what}: free some and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {what}: change the folder's permissions, or {otherwise}"
    return f"can't write {what}: {error.strerror or error}"
