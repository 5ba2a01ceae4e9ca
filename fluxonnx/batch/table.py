"""The table of a folder of pictures: what made each, written line by line while they are made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fluxonnx.batch.rows import Row
from fluxonnx.checkpoint.reading import open_regular, parse_json
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.files import atomic_write, describe_os_error

NAME, PARQUET = "pictures.jsonl", "pictures.parquet"
# More than a record with the longest prompt that a table of prompts can hold; a longer line is of something else.
LONGEST_LINE = 1 << 30
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Entry:
    """Where in the file a record is, and what decides whether its picture is made again."""

    offset: int
    length: int
    sha256: str
    digest: str


class Table:
    """The records of a folder, one per line of its file; the last one of a row counts.

    A process that is killed leaves at most half a line at the end, which is cut off. A context manager that closes the
    file.
    """

    def __init__(self, folder: Path) -> None:
        """Open the file, which is made if there is none.

        Raises:
            FluxonnxError: It can't be opened.
        """
        self.folder, self.path = folder, folder / NAME
        self._made: dict[str, Entry] = {}  # by the names of pictures
        self._last: dict[int, Entry] = {}  # by the numbers of rows that were made or failed now
        try:
            if self.path.exists():
                open_regular(self.path).close()
            self._file: BinaryIO = self.path.open("a+b")
            self._file.truncate(self._read())
        except OSError as error:
            raise FluxonnxError(describe_os_error(error, self.path)) from None

    def _read(self) -> int:
        """Remember the records that are there; returns where the last whole line ends."""
        self._file.seek(0)
        end = 0
        while line := self._file.readline(LONGEST_LINE):
            if not line.endswith(b"\n"):
                if len(line) == LONGEST_LINE:
                    raise FluxonnxError(f"{self.path} is no table of pictures: choose another folder with -o")
                break
            self._remember(line, end)
            end += len(line)
        return end

    def _remember(self, line: bytes, offset: int) -> None:
        try:
            record = parse_json(line)
        except ValueError:
            return
        if isinstance(record, dict):
            file, sha256, digest = (record.get(name) for name in ("file", "sha256", "digest"))
            if isinstance(file, str) and isinstance(sha256, str) and isinstance(digest, str):
                self._made[file] = Entry(offset, len(line), sha256, digest)

    def __contains__(self, row: Row) -> bool:
        """Whether a picture of the name of this row's was made."""
        return row.file in self._made

    def is_made(self, row: Row) -> bool:
        """Whether the picture of a row is there, whole, and of what the row says."""
        entry = self._made.get(row.file or "")
        if entry is None or entry.digest != row.digest:
            return False
        try:
            with open_regular(self.folder / str(row.file)) as file:
                return hashlib.sha256(file.read()).hexdigest() == entry.sha256
        except OSError:
            return False

    def append(self, row: Row, result: Mapping[str, Any]) -> None:
        """Write the record of a row.

        Raises:
            OSError: It can't be written.
        """
        record = {
            "row": row.number,
            "id": row.values.get("id"),
            "file": None if result.get("error") else row.file,
            "sha256": result.get("sha256"),
            "prompt": row.values.get("prompt"),
            "seed": result.get("seed", row.values.get("seed")),
            "seconds": result.get("seconds"),
            "worker": result.get("worker"),
            "error": result.get("error"),
            "warning": result.get("warning"),
            "parameters": json.loads(result["parameters"]) if result.get("parameters") else None,
            "digest": row.digest,
        }
        line = json.dumps(record).encode() + b"\n"
        offset = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(line)
            self._file.flush()
        except OSError:
            os.ftruncate(self._file.fileno(), offset)
            raise
        self._last[row.number] = Entry(offset, len(line), "", row.digest)

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the table again with one record for each of these rows, in their order, and close it.

        Raises:
            OSError: It can't be written.
        """
        with atomic_write(self.path) as whole:
            with whole.open("wb") as file:
                for line in self._lines(rows):
                    file.write(line)
            self._file.close()  # Windows replaces no file that is open

    def write_parquet(self, rows: Sequence[Row]) -> Path:
        """Write the same as a Parquet file beside it.

        Raises:
            UsageError: pyarrow is not installed.
            OSError: It can't be written.
        """
        pyarrow, parquet = arrow()
        path = self.folder / PARQUET
        with atomic_write(path) as whole, parquet.ParquetWriter(whole, _schema(pyarrow)) as writer:
            lines = self._lines(rows)
            while group := [json.loads(line) for line, _ in zip(lines, range(ROWS_AT_ONCE), strict=False)]:
                for record in group:
                    record["parameters"] = json.dumps(record["parameters"]) if record["parameters"] else None
                writer.write_table(pyarrow.Table.from_pylist(group, _schema(pyarrow)))
        return path

    def _lines(self, rows: Sequence[Row]) -> Iterator[bytes]:
        for row in rows:
            if entry := self._last.get(row.number) or self._made.get(row.file or ""):
                self._file.seek(entry.offset)
                yield self._file.read(entry.length)

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def arrow() -> tuple[Any, Any]:
    """Return pyarrow and its part for Parquet.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError('Parquet needs a package: pip install "fluxonnx[parquet]"') from None
    return pyarrow, parquet


def _schema(pyarrow: Any) -> Any:
    kinds = {"row": pyarrow.int64(), "seed": pyarrow.uint64(), "seconds": pyarrow.float64()}
    names = ("row", "id", "file", "sha256", "prompt", "seed", "seconds", "worker", "error", "warning", "parameters")
    return pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in (*names, "digest")])
