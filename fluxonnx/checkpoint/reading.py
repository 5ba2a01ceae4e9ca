"""Reading files that strangers made: regular files only, of bounded size, and JSON of bounded depth."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fluxonnx.errors import CheckpointError

# No JSON file of a model is as deep as this, and `repr` and `json.dumps` can still show it.
MAX_DEPTH = 64
# More digits than any size or seed has; int() itself takes quadratic time, and refuses some thousands.
MAX_DIGITS = 40
MAX_TEXT_BYTES = 64 << 20

# How files begin that are often found in the place of another, and what a person can do.
PYTORCH = "is a PyTorch file, which can run programs when it is opened: use the .safetensors files of the model"
ARCHIVE = "is an archive: unpack it, and pass what is in it"
FOREIGN = (
    (b"GGUF", "is a GGUF file: pass it with --transformer or --text-encoder"),
    (
        b"version https://git-lfs",
        "is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder, or use `hf download`",
    ),
    (b"# xet version", "is a Xet pointer, not the file itself: download it with `hf download`"),
    (b"PK\3\4", f"is a zip or PyTorch file ({PYTORCH.partition(': ')[2]})"),
    *((bytes([0x80, protocol]), PYTORCH) for protocol in (2, 3, 4, 5)),
    (b"\x1f\x8b", ARCHIVE),
    (b"7z\xbc\xaf", ARCHIVE),
    (b"Rar!", ARCHIVE),
    (b"\x28\xb5\x2f\xfd", ARCHIVE),
    (b"\x89HDF", "is an HDF5 file of Keras or TensorFlow: use the .safetensors files of the model"),
    (b"\x89PNG", "is a picture: pass weights"),
    (b"\xff\xd8\xff", "is a picture: pass weights"),
)
WEB_PAGE = "is a web page, not the file itself: download it again, logged in where the model asks for that"
# What the hub answers instead of a file, as text.
REFUSALS = (b"access to model", b"invalid username or password", b"entry not found", b"unauthorized", b"forbidden")
REFUSED = (
    "is an answer that the download was refused, not the file itself: log in, accept the licence, download it again"
)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; anything else could block for ever, or never end.

    Raises:
        OSError: It can't be opened, or is no regular file; `strerror` says why in words.
    """
    try:
        # looked at first, since the opening of a device can do things
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise _not_regular(path)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError:  # NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, "no file can have such a name", _named(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb")


def _not_regular(path: str | Path) -> OSError:
    if Path(path).is_dir():
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), _named(path))
    return OSError(errno.EINVAL, "it is not a regular file", _named(path))


def _named(path: str | Path) -> str:
    return os.fspath(path)


def read_bounded(path: str | Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        OSError: It can't be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit >> 20} MB", _named(path))
    return content


def check_readable(path: Path) -> None:
    """Check that a file of a model can be opened.

    Raises:
        CheckpointError: It can't be.
    """
    try:
        open_regular(path).close()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the model directory is not complete, download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None


def is_file(path: Path) -> bool:
    """Whether there is a regular file, or there may be one: who lacks the permission to look can't open it either.

    So what is behind a locked door is never taken for missing, and opening it says what is wrong. False also where the
    name is impossible.
    """
    return _is(stat.S_ISREG, path)


def is_folder(path: Path) -> bool:
    """Whether there is a folder, or there may be one; see `is_file`."""
    return _is(stat.S_ISDIR, path)


def exists(path: Path) -> bool:
    """Whether there is anything, if only a dangling link, or there may be; see `is_file`."""
    try:
        path.lstat()
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _is(kind: Callable[[int], bool], path: Path) -> bool:
    try:
        return kind(path.stat().st_mode)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False


def foreign(head: bytes) -> str | None:
    """Return what a file is that begins with these bytes, if that is something else than what fluxonnx reads."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return WEB_PAGE
    if start.startswith(REFUSALS) or start.startswith(b'{"error"'):
        return REFUSED
    if len(head) >= 64 and not any(head):
        return "begins with zeros: its download has not finished, go on with it or download it again"
    return next((what for magic, what in FOREIGN if head.startswith(magic)), None)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of bounded depth and with integers of bounded length; of equal keys, the last counts.

    Raises:
        ValueError: It is not such JSON; the message is one short line.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    layer, depth = [value], 0
    while layer:
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        inner: list[Any] = []
        for item in layer:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        layer, depth = inner, depth + 1
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits)} digits")
    return int(digits)


def is_text(value: str) -> bool:
    """Whether a string can be a name or a text: it holds neither NUL nor half of a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def is_name(value: str) -> bool:
    """Whether a string can be a file's name, which may hold any bytes but NUL; Python keeps some as surrogates."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def shown(value: object, most: int = 100) -> str:
    """Return a value for a message, on one line of bounded length."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
