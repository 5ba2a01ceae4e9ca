"""Writing files so that nothing half-written ever has a final name."""

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
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it becomes `path` if the block ends well and is removed if not.

    What a killed process left under such a name is removed, too: it can be gigabytes.
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
def resuming(path: Path, header: bytes) -> Iterator[BinaryIO]:
    """Yield a file that starts with `header` and becomes `path` if the block ends well; if not, it is kept.

    The file may hold what an interrupted run with the same header wrote; it is positioned at its end.

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
    """Take a file for this process, where the system can."""
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
    """Find out whether a file could be put at `path`; leaves nothing behind, and what is there as it is.

    Raises:
        OSError: It could not.
    """
    with suppress(InterruptedError), replacing(path.with_name(f"{path.name}.probe")) as temporary:
        temporary.touch()
        raise InterruptedError  # probed enough: nothing is to be renamed


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


def explain(error: OSError, what: object, otherwise: str = "choose another with -o") -> str:
    """Say in one line why writing `what` failed and what to do about it.

    Args:
        error: Why.
        what: The file, or a word for it.
        otherwise: What to do where there is no permission, other than to change it.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {what}: free some and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {what}: change the folder's permissions, or {otherwise}"
    return f"can't write {what}: {error.strerror or error}"
