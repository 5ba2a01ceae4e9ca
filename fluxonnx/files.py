"""Writing files so that no half-written file ever has its final name."""

from __future__ import annotations

import errno
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fluxonnx.errors import ExportError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it becomes `path` if the block succeeds and is removed otherwise.

    Temporary files of killed processes are removed, too: they can be gigabytes.
    """
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def resumable_write(path: Path, header: bytes) -> Iterator[BinaryIO]:
    """Yield a file that starts with `header` and becomes `path` if the block succeeds; otherwise it is kept.

    The file may hold what an interrupted run with the same header wrote; the position is at its end.

    Raises:
        ExportError: Another process is writing it.
    """
    partial = path.with_name(f".{path.name}.partial")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        if not _lock(file):
            raise ExportError(f"another process is writing {path}: wait for it to end")
        if file.read(len(header)) != header:
            file.seek(0)
            file.truncate()
            file.write(header)
        file.seek(0, os.SEEK_END)
        yield file
        file.truncate()
    os.replace(partial, path)


def _lock(file: BinaryIO) -> bool:
    """Lock a file for this process; True also where the system has no locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def probe(path: Path) -> None:
    """Find out whether a file could be written at `path`, without leaving or changing anything.

    Raises:
        OSError: It could not.
    """
    with suppress(InterruptedError), atomic_write(path.with_name(f"{path.name}.probe")) as temporary:
        temporary.touch()
        raise InterruptedError  # so that nothing is renamed


def _sweep(path: Path) -> None:
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.*.tmp"):
        owner = leftover.name.split(".")[-3]
        if owner.isdigit() and not _is_alive(int(owner)):
            with suppress(OSError):
                leftover.unlink()


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere signal 0 would not ask but kill
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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
