"""The lines of earlier sessions: kept for their user alone, and shared by sessions that run at once."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import FileHistory

from fluxonnx.errors import FluxonnxError
from fluxonnx.files import describe_os_error

# A file larger than this is cut to its last half when a session begins.
MOST_BYTES = 1_000_000


class PrivateHistory(FileHistory):
    """A file that only its user can read; a line is added by one system call, so that sessions do not mix theirs."""

    def store_string(self, string: str) -> None:
        """Add a line; where that fails, the session goes on without."""
        entry = "\n# -\n" + "".join(f"+{line}\n" for line in string.split("\n"))
        with suppress(OSError):
            _append(Path(os.fsdecode(self.filename)), entry.encode("utf-8", "replace"))


def open_history(folder: Path | None = None) -> PrivateHistory:
    """Return the user's history, whose folder and file are made if they are not there.

    Args:
        folder: Another folder than the user's.

    Raises:
        FluxonnxError: It can't be written.
    """
    folder = folder or user_state()
    if folder is None:
        raise FluxonnxError("lines are not kept: there is no home directory (set HOME or XDG_STATE_HOME)")
    path = folder / "history"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _append(path, b"")
        _shorten(path)
    except OSError as error:
        reason = describe_os_error(error, path, "set XDG_STATE_HOME to another one")
        raise FluxonnxError(f"lines are not kept: {reason}") from None
    return PrivateHistory(str(path))


def user_state() -> Path | None:
    """Return the user's folder for what a program remembers: $XDG_STATE_HOME, else that of the system."""
    if found := os.environ.get("XDG_STATE_HOME"):
        return Path(found) / "fluxonnx"
    if sys.platform == "win32" and (found := os.environ.get("LOCALAPPDATA")):
        return Path(found) / "fluxonnx"
    try:
        return Path.home() / ".local" / "state" / "fluxonnx"
    except RuntimeError:
        return None


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        if hasattr(os, "fchmod"):  # a file that was made by other means
            with suppress(OSError):
                os.fchmod(descriptor, 0o600)
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _shorten(path: Path) -> None:
    """Cut a file that has grown: in place, as another session may have it open."""
    if path.stat().st_size <= MOST_BYTES:
        return
    with path.open("r+b") as file:
        file.seek(-MOST_BYTES // 2, os.SEEK_END)
        rest = file.read()
        start = rest.find(b"\n\n# -\n")  # the beginning of an entry
        file.seek(0)
        file.write(rest[start:] if start >= 0 else b"")
        file.truncate()
