"""From a table of prompts to the rows of a batch: what each draws, with which seed, into which file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluxonnx.batch.names import ID, file_name, seed_of
from fluxonnx.batch.painter import Painter
from fluxonnx.checkpoint.digests import content_digest
from fluxonnx.checkpoint.reading import is_file
from fluxonnx.errors import CheckpointError, UsageError
from fluxonnx.runtime.lines import PICTURE_FILES, combined
from fluxonnx.runtime.prompt_file import KEYS, Line, read_lines

REQUEST_KEYS = frozenset(name for name, field in KEYS.items() if "request" in field.places)
INPUT_KEYS = {**KEYS, ID.name: ID}
# The settings of a painter that have no effect on what a picture looks like.
WITHOUT_EFFECT = ("threads", "keep_loaded", "cache_dir", "folder", "format")


@dataclass(frozen=True)
class Row:
    """A row of a batch.

    Attributes:
        number: Its place among the rows that are not empty, from 1.
        where: What messages call it.
        values: What it says, together with the flags, and its seed: what a painter takes.
        file: The name of its picture in the folder; None if it has no possible one.
        digest: The SHA-256 of everything that decides what the picture is; a picture with another one is out of date.
        error: What is wrong with it; None if nothing is, as far as can be seen without the model.
    """

    number: int
    where: str
    values: Mapping[str, Any]
    file: str | None
    digest: str
    error: str | None


def read_rows(
    path: Path,
    painter: Painter,
    seed: int = 0,
    flags: Mapping[str, Any] | None = None,
    model: Path | None = None,
) -> list[Row]:
    """Read a table.

    Args:
        path: A file as `generate --prompt-file` takes it; its lines can also have an `id`.
        painter: What will make the pictures.
        seed: Decides the seeds of the rows that have none.
        flags: Attributes of `Request` that replace those of each row.
        model: The model directory as this machine sees it; by default the painter's.

    Raises:
        UsageError: The file can't be read or is empty, or the columns of a table are wrong. What is wrong with a line
            is the error of its row.
    """
    place = model or (Path(painter.model) if painter.model else None)
    about = _settings(painter, place)
    rows: list[Row] = []
    taken: dict[str, Row] = {}
    for number, line in enumerate(read_lines(path, INPUT_KEYS), 1):
        row = _row(number, line, painter, seed, flags or {}, about)
        if row.file is not None:
            other = taken.setdefault(os.path.normcase(row.file), row)
            if other is not row:
                error = f"{row.file} is already the picture of {other.where}: give each row another id or output"
                row = Row(number, row.where, row.values, None, row.digest, error)
        rows.append(row)
    return rows


def _row(
    number: int,
    line: Line,
    painter: Painter,
    seed: int,
    flags: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Row:
    values: dict[str, Any] = {"row": number, **line.values}
    file, error = None, str(line.error) if line.error else None
    if line.error is None:
        try:
            file = file_name(values, painter.format)
            # Only what names the row decides: not what it draws, and not whether an earlier row has gone.
            values["seed"] = seed_of(values, seed)
        except UsageError as problem:
            file, error = None, f"{line.where}: {problem}"
    values = {name: value for name, value in values.items() if name not in REQUEST_KEYS} | combined(values, flags)
    drawn = {name: value for name, value in values.items() if name not in ("row", "id", "output")}
    names = [str(name) for key in PICTURE_FILES for name in drawn.get(key, ())] + [str(drawn.get("mask", ""))]
    suffix = Path(file).suffix if file else ""
    facts = [drawn, [_content(Path(name)) for name in names if name], suffix, about]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return Row(number, line.where, values, file, digest, error)


def _settings(painter: Painter, model: Path | None) -> dict[str, Any]:
    """Return what a painter's settings say about pictures; of files, what they hold and not where they are."""
    known = {name: value for name, value in asdict(painter).items() if name not in WITHOUT_EFFECT}
    for name in ("transformer", "text_encoder", "vae"):
        known[name] = known[name] and _contents(Path(known[name]))
    known["lora"] = [
        (Path(text).name, _content(Path(text.rpartition(":")[0])) or _content(Path(text))) for text in painter.lora
    ]
    known["model"] = [model.name, _contents(model)] if model else None
    return known


def _contents(place: Path) -> list[tuple[str, str | None]]:
    """Return the digests of a file of weights, or of those in a folder and in its folders; none if it is not here."""
    files = sorted({*place.glob("*.safetensors"), *place.glob("*/*.safetensors")}) or [place]
    return [(file.name, digest) for file in files if (digest := _content(file))]


def _content(path: Path) -> str | None:
    """Return a digest of a file; None for one that is not here, which a worker may have."""
    try:
        return content_digest(path) if is_file(path) else None
    except CheckpointError:
        return None
