"""What names a row: its number or id, from which its seed and the name of its picture follow."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxonnx.checkpoint.reading import is_text, shown
from fluxonnx.errors import UsageError
from fluxonnx.runtime.field import Field
from fluxonnx.runtime.fields import FIELDS
from fluxonnx.runtime.prompt_file import KEYS

# What a row can hold: what a line of a prompt file can, what only flags can say of all, and what names it.
ID = Field(name="id", kind=str)
ROW = Field(name="row", kind=int, low=1)
ROW_KEYS = {
    **KEYS,
    **{field.name: field for field in FIELDS if "request" in field.places},
    ID.name: ID,
    ROW.name: ROW,
}
# The bytes that a part of a path may have on most file systems.
LONGEST = 255
# What can't be part of a file's name somewhere.
UNSAFE = frozenset('/\\:*?"<>|')


def derived_seed(seed: int, key: object) -> int:
    """Return the seed of a row that names none: 32 bits of the SHA-256 of the batch's seed and of what names the row.

    Args:
        seed: That of the batch.
        key: The number of the row, or its id; what it draws does not count.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest()[:4], "big")


def seed_of(values: Mapping[str, Any], seed: int = 0) -> int:
    """Return the seed of a row, by default one that is the same in each run.

    Args:
        values: What the row says.
        seed: The seed of the batch.

    Raises:
        UsageError: The row's seed is out of range.
    """
    from fluxonnx.runtime.seeds import checked_seed  # imports numpy

    if "seed" in values:
        return checked_seed(values["seed"])
    key = values.get("id", values.get("row"))
    return derived_seed(seed, json.dumps(values, sort_keys=True, default=str) if key is None else key)


def file_name(values: Mapping[str, Any], format: str) -> str | None:
    """Return the name of a row's picture inside the folder of all: its `output`, or by its `id` or its number.

    Returns:
        None if the row has none of them.

    Raises:
        UsageError: The name would lead out of the folder, or is of no known format.
    """
    from fluxonnx.runtime.saving import FORMATS  # imports Pillow

    if "output" in values:
        name = str(values["output"])
        path = Path(name)
        if path.suffix.lower() not in FORMATS:
            raise UsageError(f"output {shown(name)} must end in one of {', '.join(FORMATS)}")
        inside = not path.is_absolute() and ".." not in path.parts and not path.drive and "\\" not in name
        if not inside or path.name.startswith(".") or not is_text(name):
            raise UsageError(f"output {shown(name)} must be a name inside the folder of the pictures")
        if any(len(os.fsencode(part)) > LONGEST for part in path.parts):
            raise UsageError(f"output {shown(name)} is too long: {LONGEST} bytes are possible")
        return path.as_posix()
    if "id" in values:
        name = str(values["id"])
        if (
            not name
            or set(name) & set('/\\:*?"<>|')
            or name.startswith(".")
            or not is_text(name)
            or name != name.strip()
        ):
            raise UsageError(f"id {shown(name)} can't be the name of a file: use letters, digits, - and _")
        if len(os.fsencode(f"{name}.{format}")) > LONGEST:
            raise UsageError(f"id {shown(name)} is too long: {LONGEST} bytes are possible, ending included")
        return f"{name}.{format}"
    return f"{values['row']:06}.{format}" if "row" in values else None
