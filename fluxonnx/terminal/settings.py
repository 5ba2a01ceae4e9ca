"""What the pictures of a session have in common: values by the names of the table of fields, from text."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxonnx.checkpoint.reading import is_file
from fluxonnx.errors import UsageError
from fluxonnx.runtime.field import Field
from fluxonnx.runtime.fields import FIELD, FIELDS

# The autoencoder makes one latent pixel of 8x8, and a latent token holds 2x2 of those. A model of another kind refuses
# a size when it draws.
PIXELS_PER_TOKEN = 16
# Words that take a value back to its default.
DEFAULTS = ("default", "none", "random", "off")
BOOLEANS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
# What a session sets in another way than by its field.
NOT_SET = ("prompt", "output")


def _names(field: Field) -> Iterable[str]:
    """Yield the names of a field, the most usual first: of its long flags, of the table, of its short flags."""
    flags = sorted(field.flags, key=lambda flag: not flag.startswith("--"))
    for name in (*flags, field.name, field.name.replace("_", "-")):
        yield name.lstrip("-")


# The fields that can be set, by each of their names.
SETTABLE: dict[str, Field] = {
    name: field for field in FIELDS if field.flags and field.name not in NOT_SET for name in _names(field)
}
# What a field is called in lists and messages.
TITLE = {field.name: next(iter(_names(field))) for field in FIELDS if field.flags}
# What messages call a value that was given by a flag.
FLAG = {flag: title for name, title in TITLE.items() for flag in FIELD[name].flags}


def parse(field: Field, text: str, path: Callable[[str], Path]) -> Any:
    """Read the value of a field.

    Args:
        field: The field.
        text: What a person wrote; lists are separated by spaces, and names with spaces are quoted.
        path: Turns a word into the path of a file.

    Returns:
        The value, of the field's type and in its range; a list where its flag takes several values.

    Raises:
        UsageError: The text is no such value.
    """
    title = TITLE[field.name]
    if field.kind is bool:
        if text.lower() not in BOOLEANS:
            raise UsageError(f"{title} is {_short(text)}: say on or off")
        return BOOLEANS[text.lower()]
    convert: Callable[[str], Any] = path if field.kind is Path else field.flag_options.get("type", field.kind)
    several = field.flag_options.get("nargs") == "+" or field.flag_options.get("action") == "append"
    whole = field.kind is str or (field.kind is Path and not several and is_file(Path(text)))
    values = [_converted(title, convert, field, word) for word in ([text] if whole else words(text))]
    if not several and len(values) > 1:
        raise UsageError(f"{title} takes one value, and {_short(text)} are {len(values)}")
    for value in values:
        _check(field, value)
    return values if several else values[0]


def _converted(title: str, convert: Callable[[str], Any], field: Field, word: str) -> Any:
    try:
        return convert(word)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{title}: {error}") from None
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        expected = "an integer" if field.kind is int else "a number"
        raise UsageError(f"{title} is {_short(word)}, expected {expected}") from None


def _check(field: Field, value: Any) -> None:
    """Check a value, or an item of a list whose flag takes them one by one."""
    if field.kind is Path:
        return
    single = replace(field, many=False) if field.many and not isinstance(value, list) else field
    single.check(value, PIXELS_PER_TOKEN)


def size(text: str) -> dict[str, Any]:
    """Read the size of pictures: 512x512, 512 512, 512, or "input".

    Raises:
        UsageError: It is none.
    """
    if text == "input":
        return {"size": text}
    if not (found := re.fullmatch(r"(\d{1,6})(?:\s*[x\u00d7*, ]\s*(\d{1,6}))?", text, re.IGNORECASE)):
        raise UsageError(f"size is {_short(text)}: write it as 512x512, or input for the size of the input picture")
    sides = {"width": int(found[1]), "height": int(found[2] or found[1])}
    for name, side in sides.items():
        FIELD[name].check(side, PIXELS_PER_TOKEN)
    return sides


def words(text: str) -> list[str]:
    """Split a text at spaces, as a shell does: quotes and backslashes keep them.

    Raises:
        UsageError: A quote is not closed.
    """
    try:
        found = shlex.split(text, posix=os.name != "nt")
    except ValueError:
        raise UsageError(f"{_short(text)} has a quote without its other half") from None
    return found if os.name != "nt" else [word.strip("\"'") for word in found]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the one that was probably meant."""
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"did you mean !{close[0]}?" if close else "!help lists what there is"


def in_our_words(message: str) -> str:
    """Write the flags in a message of the command line as the commands of a session."""

    def command(found: re.Match[str]) -> str:
        return f"!{FLAG[found[0]]}" if found[0] in FLAG else found[0]

    return re.sub(r"(?<![\w-])--?[A-Za-z][A-Za-z-]*\b", command, message)


def shown(value: Any) -> str:
    """Write a value as a person would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    return shlex.quote(str(value)) if isinstance(value, Path) else str(value)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
