"""A batch: which rows are made, by which engine, and what is written of each."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxonnx.batch.painter import Painter
from fluxonnx.batch.rows import Row
from fluxonnx.batch.table import NAME, Table, arrow
from fluxonnx.checkpoint.reading import exists, is_folder, is_name
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.files import describe_os_error, exclusive
from fluxonnx.runtime.outputs import write_output

# engine(painter, values of rows) -> the results of each row as `Painter` returns them, and its "row", in any order.
# It may return a row twice, or not at all.
Engine = Callable[[Painter, Sequence[Mapping[str, Any]]], Generator[Mapping[str, Any], None, None]]
# What is wrong with the name of one picture; anything else is wrong with the folder, and ends the batch.
WRONG_NAME = {errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ, errno.ENXIO}
NO_RESULT = "the engine returned nothing for it: run the same command again"


@dataclass
class Summary:
    """What became of the rows of a batch: how many were made now, were there before, or failed, and the first error."""

    rows: int
    made: int = 0
    kept: int = 0
    changed: int = 0
    failed: int = 0
    first_error: str = ""
    files: list[Path] = field(default_factory=list)


def make_pictures(
    rows: Sequence[Row],
    folder: Path,
    painter: Painter,
    engine: Engine,
    *,
    again: bool = False,
    parquet: bool = False,
    begin: Callable[[Summary], object] = lambda summary: None,
    watch: Callable[[Row, Mapping[str, Any]], object] = lambda row, result: None,
) -> Summary:
    """Make the pictures of a batch that are not there yet, whole and of what their rows say.

    Each picture is written whole or not at all, and its record follows it. A row that is wrong costs only its own
    picture.

    Args:
        rows: All rows of the batch.
        folder: Where pictures and table are written; made if it does not exist.
        painter: What makes the pictures.
        engine: What runs it: `local.engine` or `cluster.engine`.
        again: Whether to make also the pictures that are there.
        parquet: Whether to write the table also as a Parquet file.
        begin: Called before the first picture, when it is known what is there.
        watch: Called after each row that was made or failed, with its results.

    Raises:
        UsageError: The folder holds pictures that no table tells of, or is a file.
        FluxonnxError: The folder can't be written to, another process is writing to it, or the engine fails. Run the
            same again: what was made is not made again.
    """
    if parquet:
        arrow()
    check_folder(folder, rows)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluxonnxError(describe_os_error(error, folder)) from None
    with exclusive(folder, on_wait=lambda: _refuse(folder)), Table(folder) as table:
        summary = Summary(len(rows))
        waiting = _sort(rows, table, summary, again)
        try:
            begin(summary)
            for row in rows:
                if row.error is not None:
                    _record(table, row, {"error": row.error}, summary, watch)
            with closing(_run(engine, painter, waiting)) as results:
                for row, result in results:
                    _record(table, row, _saved(folder, row, result), summary, watch)
            summary.files = [table.path, *([table.write_parquet(rows)] if parquet else [])]
            table.finish(rows)
        except OSError as error:
            raise FluxonnxError(describe_os_error(error, error.filename or folder)) from None
    return summary


def _sort(rows: Sequence[Row], table: Table, summary: Summary, again: bool) -> dict[int, Row]:
    """Return the rows to make, by their numbers."""
    waiting = {}
    for row in rows:
        if row.error is not None:
            continue
        if not again and table.is_made(row):
            summary.kept += 1
            continue
        summary.changed += row in table
        waiting[row.number] = row
    return waiting


def _run(
    engine: Engine, painter: Painter, waiting: dict[int, Row]
) -> Generator[tuple[Row, Mapping[str, Any]], None, None]:
    """Yield each row once, with its results."""
    if not waiting:
        return
    with closing(engine(painter, [row.values for row in waiting.values()])) as results:
        for result in results:
            row = waiting.pop(result["row"], None)
            if row is not None:  # an engine that tries again may return one twice
                yield row, result
    for row in waiting.values():
        yield row, {"error": NO_RESULT}


def _saved(folder: Path, row: Row, result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write the picture of a row; returns its results, with an error if that is not possible."""
    if result.get("error"):
        return result
    data, path = result["picture"], folder / str(row.file)
    if hashlib.sha256(data).hexdigest() != result["sha256"]:
        return {**result, "sha256": None, "error": "its bytes were damaged on their way: run the same command again"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, data)
    except OSError as error:
        if error.errno not in WRONG_NAME and not isinstance(error, FileExistsError):
            raise
        return {**result, "sha256": None, "error": f"{path} can't be written: {error.strerror or error}"}
    return result


def _record(
    table: Table,
    row: Row,
    result: Mapping[str, Any],
    summary: Summary,
    watch: Callable[[Row, Mapping[str, Any]], object],
) -> None:
    table.append(row, result)
    if error := result.get("error"):
        summary.failed += 1
        summary.first_error = summary.first_error or located(row, error)
    else:
        summary.made += 1
    watch(row, result)


def located(row: Row, error: str) -> str:
    """Return the error of a row with the place of the row in the table of prompts."""
    return error if error.startswith(row.where) else f"{row.where}: {error}"


def check_folder(folder: Path, rows: Sequence[Row]) -> None:
    """Check before a long run whether a folder can be that of a batch, without changing anything.

    Raises:
        UsageError: It is a file, or in one, or can't be a name. Or it holds pictures of the names of these rows and no
            table: they are someone else's.
    """
    if not is_name(str(folder)):
        raise UsageError(f"{str(folder)!r} can't be the name of a folder: choose another with -o")
    for place in (folder, *folder.absolute().parents):
        if exists(place) and not is_folder(place):
            what = "is a file" if place == folder else f"is inside of {place}, which is a file"
            raise UsageError(f"{folder} {what}: choose a folder with -o")
    if exists(folder / NAME):
        return
    there = next((row.file for row in rows if row.file and exists(folder / row.file)), None)
    if there is not None:
        raise UsageError(
            f"{folder} holds {there}, and no {NAME} that says what made it: choose an empty folder with -o"
        )


def _refuse(folder: Path) -> None:
    raise FluxonnxError(f"another process is making pictures in {folder}: wait for it, or choose another with -o")
