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
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fluxonnx.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows, where what is open can neither be renamed nor removed
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]

# Names of at most this many bytes are part of the temporary name; others are replaced by a digest. File systems allow
# 255 bytes, encrypted ones 143.
LONGEST_PART = 100

# Where locks can't tell whether a temporary file is still being written: the age in seconds at which it is not.
ABANDONED_AFTER = 24 * 60 * 60

LOCK_NAME = ".fluxonnx.lock"
# Windows locks bytes of a file: one beyond the end of the lock file, which is empty. And it waits for 10 s at most.
LOCKED_BYTE = 2**30
LOOK_AGAIN_AFTER = 0.1

_BINARY = getattr(os, "O_BINARY", 0)
# A link in a stranger's model directory must not choose what is written or waited for.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_held = threading.local()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; it becomes `path` if the block succeeds and is removed otherwise.

    The file exists and is empty; it is to be written in place, because its lock tells other processes that it is still
    in use. Temporary files of killed processes are removed, too: they can be gigabytes.
    """
    sweep(path)
    with temporary_file(path, _prefix(path)) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextmanager
def temporary_file(path: Path, prefix: str) -> Iterator[Path]:
    """Yield a new file in the folder of `path`, which is gone after the block unless the block renamed it.

    It is locked for as long as the block lasts: `remove_leftovers(folder, prefix + "*.tmp")` leaves it alone.

    Raises:
        OSError: It can't be made; the error names `path`.
    """
    temporary, descriptor = _claim(path, prefix, _make_file)
    try:
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink()
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path`, unless another process has made that meanwhile."""
    sweep(path)
    temporary, descriptor = _claim(path, _prefix(path), _make_folder)
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
    unfinished = path.with_name(f".{path.name}.partial")
    while True:
        with _named(path):
            descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | _BINARY | _NO_LINK, 0o666)
        if fcntl is not None:  # where an open file can't be renamed, `exclusive` has to do
            _lock(descriptor, wait=True)
        if _is_at(descriptor, unfinished):
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
            os.replace(unfinished, path)
    if fcntl is None:
        os.replace(unfinished, path)


@contextmanager
def exclusive(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Let one thread of all processes in at a time; it may enter again.

    A folder that can't be written to, and a file system without locks, let everyone in.

    Args:
        folder: The folder that is to be changed.
        on_wait: Called if another one has to be waited for; by default, a warning says so.
    """
    folders: set[Path] = _held.__dict__.setdefault("folders", set())
    key = folder.resolve()
    if key in folders:
        yield
        return
    lock = folder / LOCK_NAME
    descriptor = _acquire(lock, on_wait or partial(_tell_of_waiting, folder))
    folders.add(key)
    try:
        yield
    finally:
        folders.discard(key)
        if descriptor is not None:
            _release(descriptor, lock)


def _tell_of_waiting(folder: Path) -> None:
    warnings.warn(f"another process is writing to {folder}: waiting until it has finished", stacklevel=5)


def _release(descriptor: int, lock: Path) -> None:
    if fcntl is None:  # fails if another one has opened it meanwhile, who will remove it
        os.close(descriptor)
    # Elsewhere it is removed while it is locked: whoever waits for it finds that it is gone, and makes another.
    with suppress(OSError):
        lock.unlink()
    if fcntl is not None:
        os.close(descriptor)


def _acquire(lock: Path, on_wait: Callable[[], None]) -> int | None:
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        except OSError:
            try:
                descriptor = os.open(lock, os.O_RDONLY | _NO_LINK)  # of another user
            except OSError:
                return None
        try:
            if _lock(descriptor) is False:
                on_wait()
                on_wait = _nothing  # once is enough, also if a third one comes first
                _lock(descriptor, wait=True)
            if _is_at(descriptor, lock):
                return descriptor
        except BaseException:  # Ctrl-C, or a warning that is an error
            os.close(descriptor)
            raise
        os.close(descriptor)


def _nothing() -> None:
    pass


def _lock(descriptor: int, wait: bool = False) -> bool | None:
    """Lock a file or folder for its descriptor: False if another one holds the lock, None if there are no locks."""
    if fcntl is None:
        return None if msvcrt is None else _lock_byte(descriptor, wait)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # ENOTSUP, ENOLCK, ENOSYS, EBADF: network and user-space file systems
        return None
    return True


def _lock_byte(descriptor: int, wait: bool) -> bool | None:
    while True:
        try:
            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        except PermissionError:  # EACCES: another one has locked it
            if not wait:
                return False
            time.sleep(LOOK_AGAIN_AFTER)
        except OSError:
            return None
        else:
            return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a descriptor's file still has the name `path`."""
    if fcntl is None:
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _claim(path: Path, prefix: str, make: Callable[[Path], int]) -> tuple[Path, int | None]:
    """Make a temporary file or folder that is locked before anyone takes it for a leftover."""
    while True:
        temporary = path.with_name(f"{prefix}{secrets.token_hex(6)}.tmp")
        with _named(path):
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


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let a system's error be about the file that a person knows, not about a temporary one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


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
    with temporary_file(path, _prefix(path)) as temporary:
        temporary.touch()


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


def user_caches() -> Path | None:
    """Return the user's folder for caches: $XDG_CACHE_HOME, else ~/.cache; None if there is no home directory."""
    if found := os.environ.get("XDG_CACHE_HOME"):
        return Path(found)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None
