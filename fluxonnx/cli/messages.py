"""What a command prints, on streams that may be closed, full or narrow, about names that a stranger may have chosen."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import TextIO

from fluxonnx.errors import FluxonnxError

# Characters that move the cursor, change the terminal's state or the direction of text, and halves of surrogate pairs.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# The characters of a warning or an error, which may quote a prompt of megabytes.
LONGEST = 2000


def escaped(text: str) -> str:
    """Write characters that a terminal would obey as Python writes them: a line stays one line."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shortened(text: str, longest: int = LONGEST) -> str:
    """Leave out the middle of a long text."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters left out) ... {text[-half:]}"


def complain(text: str) -> None:
    """Print a warning or an error on standard error, in one line."""
    tell(f"fluxonnx: {shortened(text)}")


def tell(text: str) -> None:
    """Print a line on standard error. If that is not possible, the run goes on: pictures count more than messages."""
    with suppress(OSError, ValueError):
        _write(sys.stderr, escaped(text))


def show(text: str) -> None:
    """Print the result of a command on standard output; lines stay lines.

    A reader that has seen enough, such as `head`, is no failure.

    Raises:
        FluxonnxError: It can't be printed.
    """
    if sys.stdout is None:
        raise FluxonnxError("the result can't be printed: standard output is closed")
    try:
        _write(sys.stdout, "\n".join(map(escaped, text.split("\n"))))
    except BrokenPipeError:
        pass
    except OSError as error:
        raise FluxonnxError(f"the result can't be printed: {error.strerror or error}") from None


def _write(stream: TextIO | None, line: str) -> None:
    if stream is None:  # closed before Python started
        return
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError:
        mute(stream)
        raise


def mute(stream: TextIO) -> None:
    """Send what a broken stream still holds to nowhere, so that Python does not fail when it flushes it at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def finish() -> None:
    """Flush what others have printed, such as the help of the parser."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                mute(stream)


def occupy_streams() -> None:
    """Open descriptors 0 to 2 where they are closed: a file would get their number, and messages would go into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
