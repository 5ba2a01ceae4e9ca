"""The database of a server and the folder around it, which only one server uses at a time.

Every state of it is a whole one. A job is accepted when it is in the database. Its seeds are decided then, and each of
its pictures has one place: it is written to a file under a temporary name, renamed, and then entered. A process that is
killed in between leaves a file without an entry, and the next one makes that picture again, bit for bit.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.files import describe_os_error, remove_leftovers, temporary_file

try:
    import fcntl
except ImportError:  # Windows, where a file that another process has opened can't be removed
    fcntl = None  # type: ignore[assignment]

FOLDERS = ("pictures", "uploads", "thumbnails")
VERSION = 1
# How temporary files begin.
TEMPORARY = ".new."

SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    attached INTEGER NOT NULL,
    batch TEXT NOT NULL,
    parameters TEXT NOT NULL,
    seeds TEXT NOT NULL,
    warnings TEXT NOT NULL DEFAULT '[]',
    error TEXT,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    idempotency TEXT,
    UNIQUE (owner, idempotency)
);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE INDEX jobs_by_owner ON jobs (owner, number);
CREATE TABLE pictures (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    job TEXT NOT NULL,
    position INTEGER NOT NULL,
    owner TEXT NOT NULL,
    seed TEXT NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    parameters TEXT NOT NULL,
    created REAL NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0,
    UNIQUE (job, position)
);
CREATE INDEX pictures_by_owner ON pictures (owner, deleted, number);
CREATE TABLE uploads (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    format TEXT NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    parameters TEXT,
    created REAL NOT NULL
);
"""


class Database:
    """A connection that threads share. Each change is kept as a whole, and before the caller goes on."""

    def __init__(self, folder: Path) -> None:
        """Open or make a database in a folder.

        Raises:
            UsageError: Another server uses it, it can't be written to, or it is of a later version.
            FluxonnxError: It can't be opened.
        """
        self.folder = folder
        self._lock = threading.RLock()
        try:
            for name in FOLDERS:
                (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
                remove_leftovers(folder / name, f"{TEMPORARY}*.tmp")
            self._guard = _only_one(folder)
        except OSError as error:
            raise UsageError(describe_os_error(error, folder, "choose another with --data")) from None
        try:
            self._base = sqlite3.connect(folder / "queue.sqlite3", check_same_thread=False, isolation_level=None)
            self._base.row_factory = sqlite3.Row
            self._base.execute("PRAGMA journal_mode=WAL")
            # A power cut does not undo what a client was told.
            self._base.execute("PRAGMA synchronous=FULL")
            version = self._base.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise UsageError(f"{folder} was made by a later version of fluxonnx: update, or choose another folder")
            if version == 0:
                with self.changing():
                    for statement in SCHEMA.split(";\n"):
                        self._base.execute(statement)
                    self._base.execute(f"PRAGMA user_version={VERSION}")
        except sqlite3.Error as error:
            raise FluxonnxError(f"the queue in {folder} can't be opened: {error}: choose another with --data") from None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """All of the block or nothing is kept."""
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite has undone it itself where the disk is full
                    self._base.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Return what a query finds."""
        with self._lock:
            return self._base.execute(query, values).fetchall()

    def change(self, statement: str, *values: Any) -> int:
        """Run a statement inside of `changing`; returns how many rows it changed."""
        with self._lock:
            return self._base.execute(statement, values).rowcount

    def close(self) -> None:
        """Close it; another server may use the folder."""
        with self._lock:
            self._base.close()
            self._guard.close()


def _only_one(folder: Path) -> BinaryIO:
    """Lock the folder for as long as the returned file is open.

    Raises:
        UsageError: Another server has locked it.
    """
    file = (folder / "lock").open("wb")
    if fcntl is not None:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(f"another server uses {folder}: end it, or choose another folder with --data") from None
        except OSError:  # a file system without locks
            pass
    return file


def write_whole(path: Path, data: bytes, what: str) -> None:
    """Write a file that is whole whenever it has its name, also after a power cut.

    Raises:
        FluxonnxError: It can't be written.
    """
    try:
        # Not `atomic_write`, which looks through the whole folder for what others have left: that is done at the start.
        with temporary_file(path, TEMPORARY) as temporary:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise FluxonnxError(describe_os_error(error, what, "choose another with --data")) from None
