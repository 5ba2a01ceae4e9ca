"""JSON files of a model directory, whose values are checked as they are read."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fluxonnx.checkpoint.reading import foreign, is_name, parse_json, read_bounded, shown
from fluxonnx.errors import CheckpointError

# Sizes are 32-bit integers at most; no dimension of a model comes near.
MAX_SIZE = 2**31 - 1


def read_json(path: Path, otherwise: str = "download it again") -> dict[str, Any]:
    """Read a JSON object; the one place where the JSON files of a model directory are parsed.

    Args:
        path: The file.
        otherwise: What to do about a damaged one.

    Raises:
        CheckpointError: The file is missing, unreadable, too large, or not a JSON object.
    """
    try:
        content = read_bounded(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the model directory is not complete, download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    try:
        value = parse_json(content)
    except ValueError as error:
        what = foreign(content) or f"is not valid JSON ({error}): {otherwise}"
        raise CheckpointError(f"{path} {what}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object: {otherwise}")
    return value


T = TypeVar("T")


def from_json(kind: type[T], values: object, name: str = "", skip_unknown: bool = False) -> T:
    """Make a dataclass of JSON values, whose types its annotations give; nested dataclasses likewise.

    Args:
        kind: The dataclass. Its fields may be of type str, int, float, bool, None, Any, unions and dataclasses, and
            lists, tuples and dictionaries (with string keys) of these.
        values: A JSON object. Keys of fields with defaults may be missing.
        name: What the message calls the object.
        skip_unknown: Leave out keys that are not known, as a later version may add some.

    Raises:
        ValueError: A value is missing, unknown, or of another type; the message is one short line.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name or 'it'} is {shown(values)}, expected an object")
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known and not skip_unknown:
            raise ValueError(f"{_within(name, str(key))} is unknown")
    parsed = {}
    for key, item in known.items():
        if key in values:
            parsed[key] = typed(hints[key], values[key], _within(name, key), skip_unknown)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{_within(name, key)} is missing")
    return kind(**parsed)


def _within(name: str, key: str) -> str:
    key = shown(key, 40)[1:-1]
    return f"{name}.{key}" if name else key


def typed(hint: Any, value: object, name: str, skip_unknown: bool = False) -> Any:
    """Return a JSON value as the type that an annotation names; raises ValueError as `from_json` does."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, name, skip_unknown)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return typed(next(item for item in arguments if item is not type(None)), value, name, skip_unknown)
    if origin in (list, tuple):
        if isinstance(value, (list, tuple)):
            return origin(typed(arguments[0], item, f"{name}[{i}]", skip_unknown) for i, item in enumerate(value))
    elif origin is dict:
        if isinstance(value, dict):
            return {str(k): typed(arguments[1], item, _within(name, str(k)), skip_unknown) for k, item in value.items()}
    elif hint is float:
        # JSON has one kind of numbers: 2000 may stand for 2000.0
        if type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
            return value
    elif type(value) is hint and (not isinstance(value, str) or is_name(value)):
        return value
    expected = {list: "a list", tuple: "a list", dict: "an object", str: "text", bool: "true or false"}
    noun = expected.get(origin or hint, "an integer" if hint is int else "a number")
    raise ValueError(f"{name} is {shown(value)}, expected {noun}")


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

    def integer(self, key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """Return a positive integer."""
        value = self._get(key, default)
        if not _is_size(value):
            raise CheckpointError(f'{self.path}: "{key}" is {shown(value)}, expected a positive integer')
        if value > most:
            raise CheckpointError(f'{self.path}: "{key}" is {value}, which is over {most}')
        return value

    def number(self, key: str, default: float | None = None, low: float = -math.inf, high: float = math.inf) -> float:
        """Return a finite number from `low` to `high`."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(f'{self.path}: "{key}" is {shown(value)}, expected a number')
        if not low <= value <= high:
            raise CheckpointError(f'{self.path}: "{key}" is {value}, expected a number from {low:g} to {high:g}')
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f'{self.path}: "{key}" is {shown(value)}, expected true or false')
        return value

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return a non-empty list of positive integers."""
        value = self._get(key, default)
        if not isinstance(value, (list, tuple)) or not value or not all(_is_size(n) and n <= MAX_SIZE for n in value):
            raise CheckpointError(f'{self.path}: "{key}" is {shown(value)}, expected a list of positive integers')
        return tuple(value)

    def section(self, key: str) -> Config:
        """Return the object at `key`, an empty one if there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f'{self.path}: "{key}" is {shown(value)}, expected an object')
        return Config(self.path, value or {})

    def expect(self, key: str, *known: Any, missing_ok: bool = True) -> None:
        """Refuse a value other than the `known` ones: it would silently change what the model computes."""
        value = self.values.get(key)
        if value not in known and not (value is None and missing_ok):
            names = " or ".join(json.dumps(item) for item in known)
            found = json.dumps(value) if len(repr(value)) < 100 else shown(value)
            raise CheckpointError(f'{self.path}: "{key}" is {found}, but fluxonnx knows only {names}')


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
