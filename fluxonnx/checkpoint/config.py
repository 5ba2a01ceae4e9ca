"""JSON files of a model directory, whose values are checked as they are read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fluxonnx.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the model directory is not complete, download it again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


class Config:
    """One component's `config.json`, whose values are checked as they are read."""

    def __init__(self, path: Path, values: dict[str, Any] | None = None) -> None:
        """Read the file at `path`, unless its `values` are given."""
        self.path = path
        self.values = read_json(path) if values is None else values

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f'{self.path} has no "{key}"')
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f'{self.path}: "{key}" is {value!r}, expected a positive integer')
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(f'{self.path}: "{key}" is {value!r}, expected a number')
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f'{self.path}: "{key}" is {value!r}, expected true or false')
        return value

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return a non-empty list of positive integers."""
        value = self._get(key, default)
        if not isinstance(value, (list, tuple)) or not value or any(not isinstance(n, int) or n < 1 for n in value):
            raise CheckpointError(f'{self.path}: "{key}" is {value!r}, expected a list of positive integers')
        return tuple(value)

    def expect(self, key: str, *known: Any, missing_ok: bool = True) -> None:
        """Refuse a value other than the `known` ones: it would silently change what the model computes."""
        value = self.values.get(key)
        if value not in known and not (value is None and missing_ok):
            names = " or ".join(json.dumps(item) for item in known)
            raise CheckpointError(f'{self.path}: "{key}" is {json.dumps(value)}, but fluxonnx knows only {names}')
