"""Prompt files: a picture per line, as plain text or as a JSON object, or per row of a table in CSV or Parquet."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fluxonnx.checkpoint.reading import MAX_TEXT_BYTES, open_regular, parse_json, read_bounded
from fluxonnx.errors import UsageError
from fluxonnx.runtime.field import Field
from fluxonnx.runtime.fields import FIELDS

KEYS = {field.name: field for field in FIELDS if "prompt file" in field.places}

# The name that stands for standard input.
STDIN = Path("-")
# Not `splitlines`, which also splits at characters that texts from elsewhere have inside a line, such as U+2028.
LINE_END = re.compile(r"\r\n|\r|\n")
# Other braces are part of a prompt: {red|blue} circle.
OBJECT = re.compile(r'\{\s*["}]')
# What separates the items of a list in a cell of a table: names of files may have commas.
ITEMS: dict[type, str] = {str: ";", Path: ";"}
# Rows of a Parquet table that are decoded together, and how large all of them may be.
ROWS_AT_ONCE = 1000
MAX_TABLE_BYTES = 1 << 30
# pandas's words for a cell that says nothing.
EMPTY_TYPES = ("NAType", "NaTType")
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Line:
    """A line that is not empty, or a row of a table.

    Attributes:
        where: What messages call it.
        values: Its values, of the types of the table of fields.
        error: What is wrong with it; None if nothing is.
    """

    where: str
    values: Mapping[str, Any]
    error: UsageError | None = None


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """Return the values of each line that is not empty; they have the types of the table of fields.

    Args:
        path: The file, a table if its name ends in .csv or .parquet; "-" for standard input.

    Raises:
        UsageError: The file can't be read or is empty, or a line is wrong: the message has its number.
    """
    lines = read_lines(path)
    for line in lines:
        if line.error:
            raise line.error
    return [dict(line.values) for line in lines]


def read_lines(path: Path, keys: Mapping[str, Field] = KEYS) -> list[Line]:
    """Return each line of a prompt file that is not empty, with what is wrong with it.

    Args:
        path: As for `read_prompt_file`.
        keys: The fields that a line can have, by their names.

    Raises:
        UsageError: The file can't be read or is empty, or the columns of a table are wrong.
    """
    name = prompt_file_name(path)
    short = name.removeprefix("prompt file ")
    try:
        if path.suffix.lower() == ".parquet":
            lines = list(_parquet_rows(path, keys))
        else:
            text = _content(path).decode("utf-8-sig")
            read = _csv_rows if path.suffix.lower() == ".csv" else _text_lines
            lines = list(read(short, text, keys))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{name} can't be read: {reason}") from None
    if not lines:
        raise UsageError(f"{name} holds no prompt")
    return lines


def prompt_file_name(path: Path) -> str:
    """Return what messages call a prompt file."""
    return "standard input" if path == STDIN else f"prompt file {path}"


def _content(path: Path) -> bytes:
    if path != STDIN:
        return read_bounded(path)
    if sys.stdin is None:
        raise OSError(0, "it is closed")
    content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise OSError(0, f"it is larger than {MAX_TEXT_BYTES >> 20} MB")
    return content


def _text_lines(name: str, text: str, keys: Mapping[str, Field]) -> Iterator[Line]:
    for number, line in enumerate(LINE_END.split(text), 1):
        if line.strip():
            yield _line(f"{name}, line {number}", keys, partial(_object, line=line.strip()))


def _line(where: str, keys: Mapping[str, Field], read: Callable[[str], dict[str, Any]]) -> Line:
    try:
        return Line(where, checked(where, read(where), keys))
    except UsageError as error:
        return Line(where, {}, error)


def _object(where: str, line: str) -> dict[str, Any]:
    if not OBJECT.match(line):
        return {"prompt": line}
    try:
        return parse_json(line)
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON: {error}") from None


def checked(where: str, values: Mapping[str, Any], keys: Mapping[str, Field] = KEYS) -> dict[str, Any]:
    """Return the values of a line if their names and types are right; a list of one may be given without the list.

    Raises:
        UsageError: They are not; the message starts with `where`.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in keys:
            raise UsageError(f'{where} has an unknown key "{key}": known are {", ".join(keys)}')
        found[key] = [value] if keys[key].many and isinstance(value, str) else value
        if problem := keys[key].type_error(found[key]):
            raise UsageError(f"{where}: {problem}")
    if not found.get("prompt", "").strip():
        raise UsageError(f'{where} has no "prompt"')
    return found


def _csv_rows(name: str, text: str, keys: Mapping[str, Field]) -> Iterator[Line]:
    """Yield each row of a table whose first row has the names of the columns; empty cells say nothing."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    try:
        for row in reader:
            where, cells = f"{name}, line {reader.line_num}", [cell.strip() for cell in row]
            if not any(cells):
                continue
            if columns is None:
                columns = cells
                _check_columns(where, columns, keys, ": the first row has to name the columns")
                continue
            yield _line(where, keys, partial(_csv_values, keys=keys, columns=columns, cells=cells))
    except csv.Error as error:
        raise UsageError(f"{name}, line {reader.line_num} is not valid CSV: {error}") from None


def _csv_values(where: str, keys: Mapping[str, Field], columns: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) > len(columns):
        raise UsageError(f'{where} has {len(cells)} cells, and the first row {len(columns)}: quote "a, b"')
    pairs = zip(columns, cells, strict=False)
    return {key: _cell(where, keys[key], cell) for key, cell in pairs if cell and key}


def _parquet_rows(path: Path, keys: Mapping[str, Field]) -> Iterator[Line]:
    with open_regular(path) as file:
        try:
            from pyarrow import parquet
        except ImportError:
            raise UsageError(f'{path} needs a package: pip install "fluxonnx[parquet]"') from None
        try:
            table = parquet.ParquetFile(file)
            _check_columns(str(path), list(table.schema_arrow.names), keys)
            number = size = 0
            for batch in table.iter_batches(ROWS_AT_ONCE):
                size += batch.nbytes
                if size > MAX_TABLE_BYTES:
                    raise UsageError(f"{path} holds more than {MAX_TABLE_BYTES >> 20} MB: divide it")
                for row in batch.to_pylist():
                    number += 1
                    values = cleaned(row, keys)
                    if values:
                        yield _line(f"{path}, row {number}", keys, partial(_as_it_is, values=values))
        except UsageError:
            raise
        except Exception as error:  # pyarrow raises its own errors, and those of Python, for a damaged file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UsageError(f"{path} is not a whole Parquet file: {reason}") from None


def _as_it_is(where: str, values: dict[str, Any]) -> dict[str, Any]:
    return values


def cleaned(values: Mapping[str, Any], keys: Mapping[str, Field] = KEYS) -> dict[str, Any]:
    """Return the values of a row as other programs hold them, without the cells that say nothing.

    None, NaN and pandas's NA say nothing. Arrays and numbers of numpy become Python's. A whole number that is held as
    a float because other cells of its column are empty becomes an integer.
    """
    found = {}
    for key, value in values.items():
        plain = value.tolist() if hasattr(value, "tolist") else value
        if plain is None or (isinstance(plain, float) and math.isnan(plain)) or type(plain).__name__ in EMPTY_TYPES:
            continue
        if key in keys and keys[key].kind is int and isinstance(plain, float) and plain.is_integer():
            plain = int(plain)
        found[key] = plain
    return found


def _check_columns(where: str, columns: Sequence[str], keys: Mapping[str, Field], hint: str = "") -> None:
    for key in columns:
        if key and key not in keys:
            raise UsageError(f'{where} has an unknown column "{key}": known are {", ".join(keys)}')
    if "prompt" not in columns:
        raise UsageError(f'{where} has no column "prompt"{hint}')
    if len({*filter(None, columns)}) < len([*filter(None, columns)]):
        raise UsageError(f"{where} names a column twice")


def _cell(where: str, field: Field, cell: str) -> Any:
    if field.many:
        parts = [part.strip() for part in cell.split(ITEMS.get(field.kind, ","))]
        return [_value(where, field, part) for part in parts if part]
    return _value(where, field, cell)


def _value(where: str, field: Field, text: str) -> Any:
    try:
        if field.kind is bool:
            return BOOLEANS[text.lower()]
        return field.kind(text) if field.kind in (int, float) else text
    except (ValueError, KeyError):
        expected = "true or false" if field.kind is bool else "an integer" if field.kind is int else "a number"
        raise UsageError(f'{where}: "{field.name}" is {text[:40]!r}, expected {expected}') from None
