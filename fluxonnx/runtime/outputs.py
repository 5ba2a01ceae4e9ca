"""Files that a person named: checked before a run, written whole or not at all, and never in place of something else.

A link stays a link, and its target is replaced. A file keeps its permissions. Devices and pipes are written through.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path

from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.files import describe_os_error, remove_leftovers, temporary_file

# What os.link fails with on file systems that have no hard links.
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# It does not hold the name of the file, which may be as long as the system allows.
TEMPORARY = ".fluxonnx-"


def check_output(path: Path, flag: str = "-o", numbered: bool = False) -> None:
    """Check before a long run that a file can be written, without changing anything.

    Args:
        path: The file.
        flag: The flag that names it, for messages.
        numbered: Whether it will be written as `numbered_name` says.

    Raises:
        UsageError: It is a folder, in one that does not exist, something that can't be written, or its name is too
            long.
        FluxonnxError: There is no permission.
    """
    otherwise = f"choose another with {flag}"
    try:
        final = numbered_name(path, 1) if numbered else path
        _check_length(final, flag)
        found = None if numbered else _status(final)
        if found is not None and not stat.S_ISREG(found.st_mode):
            _check_special(final, found, flag)
            return
        real = final if numbered else _followed(final)
        folder = _status(real.parent)
        if folder is None or not stat.S_ISDIR(folder.st_mode):
            raise UsageError(f"folder {real.parent} does not exist: create it, or {otherwise}")
        _check_length(real, flag)
        if found is not None:
            _check_writable(real)
        with _temporary(real, b""):
            pass
    except OSError as error:
        raise FluxonnxError(describe_os_error(error, path, otherwise)) from None
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        # a NUL, or half of a surrogate pair
        raise UsageError(f"{path} can't be the name of a file: {otherwise}") from None


def write_output(path: Path, data: bytes) -> None:
    """Write a file: what was there is replaced when all of it is written.

    Raises:
        OSError: It can't be written.
    """
    found = _status(path)
    if found is not None and not (stat.S_ISREG(found.st_mode) and _standard_stream(found) is None):
        _write_through(path, found, data)
        return
    real = _followed(path)
    if found is not None:
        _check_writable(real)
    with _temporary(real, data) as temporary:
        if found is not None:
            temporary.chmod(stat.S_IMODE(found.st_mode))
        os.replace(temporary, real)


def write_numbered(path: Path, data: bytes) -> Path:
    """Write a file under the first numbered name that is free, and return that name.

    The name is taken by one system call, so that of any number of processes none writes over the file of another.

    Raises:
        OSError: It can't be written.
    """
    with _temporary(path, data) as temporary:
        for number in count(1):
            name = numbered_name(path, number)
            if not os.path.lexists(name) and _claimed(name, temporary):
                return name
    raise AssertionError  # `count` does not end


def numbered_name(path: Path, number: int) -> Path:
    """cat.png -> cat-0001.png"""  # noqa: D415
    return path.with_name(f"{path.stem}-{number:04}{path.suffix}")


def _claimed(name: Path, temporary: Path) -> bool:
    """Give a file a name, unless something has it."""
    try:
        try:
            os.link(temporary, name)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(temporary, name)
    except FileExistsError:
        return False
    return True


@contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A file beside `path` that holds `data`, and is gone after the block unless the block renamed it."""
    _sweep_once(path.parent.absolute())
    with temporary_file(path, TEMPORARY) as temporary:
        temporary.write_bytes(data)
        yield temporary


@cache
def _sweep_once(folder: Path) -> None:
    """Remove what killed processes left in a folder; once per process, because it can hold very many pictures."""
    remove_leftovers(folder, f"{TEMPORARY}*.tmp")


def _status(path: Path) -> os.stat_result | None:
    """Return what is at a path, links followed; None if nothing is."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_writable(path: Path) -> None:
    """Raise the system's error if a file that is there may not be written, although it would only be replaced."""
    os.close(os.open(path, os.O_WRONLY | getattr(os, "O_BINARY", 0)))


def _followed(path: Path) -> Path:
    """Return the file that a link leads to, which need not exist; other paths as they are."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _standard_stream(found: os.stat_result) -> int | None:
    """Return the descriptor if a file is what standard output or standard error goes to, with messages in it."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _check_special(path: Path, found: os.stat_result, flag: str) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise UsageError(f"{path} is a folder: choose a file name for {flag}")
    if kind not in (stat.S_IFCHR, stat.S_IFIFO):
        what = {stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a disk"}.get(kind, "no ordinary file")
        raise UsageError(f"{path} is {what}: choose a file name for {flag}")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "no permission")


def _write_through(path: Path, found: os.stat_result, data: bytes) -> None:
    """Write to a device, to a pipe, which waits for its reader as with any program, or to a standard stream."""
    kind = stat.S_IFMT(found.st_mode)
    if kind not in (stat.S_IFCHR, stat.S_IFIFO, stat.S_IFREG):
        raise OSError(errno.ENXIO, "it is no ordinary file")
    stream = _standard_stream(found)
    descriptor = os.open(path, os.O_WRONLY) if stream is None else os.dup(stream)
    with open(descriptor, "wb") as file:  # noqa: PTH123
        file.write(data)


def _check_length(path: Path, flag: str) -> None:
    try:
        longest = os.pathconf(path.parent, "PC_NAME_MAX")
    except (AttributeError, ValueError, OSError):  # no such function, such as on Windows
        return
    length = len(os.fsencode(path.name))
    if 0 < longest < length:
        raise UsageError(
            f"the name {path.name} is too long: it has {length} bytes, and {longest} are possible: choose another with "
            f"{flag}"
        )
