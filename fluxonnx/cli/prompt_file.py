"""Prompt files: a prompt per line, as plain text or as a JSON object with further values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import FIELDS

KEYS = {field.name: field for field in FIELDS if "prompt file" in field.places}


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """Return the values of each line that is not empty; they have the types of the table of fields.

    Raises:
        UsageError: The file can't be read or is empty, or a line is wrong: the message has its number.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"prompt file {path} can't be read: {reason}") from None
    lines = [
        _read_line(f"{path}, line {number}", line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    if not lines:
        raise UsageError(f"prompt file {path} holds no prompt")
    return lines


def _read_line(where: str, line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:  # the first also for a number with thousands of digits
        raise UsageError(f"{where} is not valid JSON: {error}") from None
    for key, value in values.items():
        if key not in KEYS:
            raise UsageError(f'{where} has an unknown key "{key}": known are {", ".join(KEYS)}')
        if problem := KEYS[key].type_error(value):
            raise UsageError(f"{where}: {problem}")
    if not values.get("prompt", "").strip():
        raise UsageError(f'{where} has no "prompt"')
    return values
