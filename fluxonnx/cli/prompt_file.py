"""Prompt files: a prompt per line, as plain text or as a JSON object with further values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fluxonnx.checkpoint.reading import parse_json, read_bounded
from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import FIELDS

KEYS = {field.name: field for field in FIELDS if "prompt file" in field.places}

# Not `splitlines`, which also splits at characters that texts from elsewhere have inside a line, such as U+2028.
LINE_END = re.compile(r"\r\n|\r|\n")
# Other braces are part of a prompt: {red|blue} circle.
OBJECT = re.compile(r'\{\s*["}]')


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """Return the values of each line that is not empty; they have the types of the table of fields.

    Raises:
        UsageError: The file can't be read or is empty, or a line is wrong: the message has its number.
    """
    try:
        text = read_bounded(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"prompt file {path} can't be read: {reason}") from None
    lines = [
        _read_line(f"{path}, line {number}", line.strip())
        for number, line in enumerate(LINE_END.split(text), 1)
        if line.strip()
    ]
    if not lines:
        raise UsageError(f"prompt file {path} holds no prompt")
    return lines


def _read_line(where: str, line: str) -> dict[str, Any]:
    if not OBJECT.match(line):
        return {"prompt": line}
    try:
        values = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON: {error}") from None
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
