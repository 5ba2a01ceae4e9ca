"""Prompt files: a picture per line, as plain text, as a JSON object with further values, or as a row of a CSV table."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxonnx.checkpoint.reading import MAX_TEXT_BYTES, parse_json, read_bounded
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
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """Return the values of each line that is not empty; they have the types of the table of fields.

    Args:
        path: The file, a table if its name ends in .csv; "-" for standard input.

    Raises:
        UsageError: The file can't be read or is empty, or a line is wrong: the message has its number.
    """
    name = prompt_file_name(path)
    try:
        text = _content(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{name} can't be read: {reason}") from None
    short = name.removeprefix("prompt file ")
    if path.suffix.lower() == ".csv":
        lines = list(_rows(short, text))
    else:
        lines = [
            _read_line(f"{short}, line {number}", line.strip())
            for number, line in enumerate(LINE_END.split(text), 1)
            if line.strip()
        ]
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


def _read_line(where: str, line: str) -> dict[str, Any]:
    if not OBJECT.match(line):
        return {"prompt": line}
    try:
        values = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON: {error}") from None
    return _checked(where, values)


def _checked(where: str, values: dict[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if key not in KEYS:
            raise UsageError(f'{where} has an unknown key "{key}": known are {", ".join(KEYS)}')
        if KEYS[key].many and isinstance(value, str):
            value = values[key] = [value]
        if problem := KEYS[key].type_error(value):
            raise UsageError(f"{where}: {problem}")
    if not values.get("prompt", "").strip():
        raise UsageError(f'{where} has no "prompt"')
    return values


def _rows(name: str, text: str) -> Iterator[dict[str, Any]]:
    """Yield the values of each row of a table whose first row has the names of the columns; empty cells say nothing."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    try:
        for row in reader:
            where, cells = f"{name}, line {reader.line_num}", [cell.strip() for cell in row]
            if not any(cells):
                continue
            if columns is None:
                columns = cells
                _check_columns(where, columns)
                continue
            if len(cells) > len(columns):
                raise UsageError(f'{where} has {len(cells)} cells, and the first row {len(columns)}: quote "a, b"')
            values = {
                key: _cell(where, KEYS[key], cell) for key, cell in zip(columns, cells, strict=False) if cell and key
            }
            yield _checked(where, values)
    except csv.Error as error:
        raise UsageError(f"{name}, line {reader.line_num} is not valid CSV: {error}") from None


def _check_columns(where: str, columns: list[str]) -> None:
    for key in columns:
        if key and key not in KEYS:
            raise UsageError(f'{where} has an unknown column "{key}": known are {", ".join(KEYS)}')
    if "prompt" not in columns:
        raise UsageError(f'{where} has no column "prompt": the first row has to name the columns')
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
