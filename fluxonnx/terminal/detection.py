"""Which way of showing pictures a terminal understands, how large its characters are, and how it is asked.

Names in the environment come first, which need no answer. Other terminals are asked: all of them answer what they are
(DA1, ECMA-48), so that is asked last, and its answer ends the waiting.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from fluxonnx.errors import UsageError

AUTO = "auto"
PROTOCOLS = ("kitty", "iterm2", "sixel", "blocks")

# Names that terminals give themselves, in the environment or as an answer, and what they understand. Konsole says that
# it knows Kitty's protocol, but not the part of it that places pictures in text: it gets Sixel, which it answers.
BY_NAME = {"kitty": "kitty", "ghostty": "kitty", "iterm": "iterm2", "wezterm": "iterm2", "mintty": "iterm2"}
# They print questions that they do not know.
MUTE = ("Apple_Terminal",)
# Terminals that can't place anything; and one that has colours, but prints questions.
POOR_TERMS = ("dumb", "unknown", "")
CONSOLE = "linux"

# XTVERSION (xterm's ctlseqs), Kitty's query of its protocol, the size of a character in pixels, and DA1.
QUESTIONS = "\x1b[>q\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[16t\x1b[c"
ANSWERS = {
    "name": re.compile(r"\x1bP>\|([^\x1b]*)\x1b\\"),
    "kitty": re.compile(r"\x1b_Gi=31;([^\x1b]*)\x1b\\"),
    "cell": re.compile(r"\x1b\[6;(\d+);(\d+)t"),
    "attributes": re.compile(r"\x1b\[\?([\d;]*)c"),
}
# Seconds until a terminal is taken for one that does not answer; one at the other end of a network gets more.
PATIENCE, PATIENCE_OF_SSH = 0.5, 2.0
# A VT340's, which terminals assume for Sixel; width and height in pixels.
USUAL_CELL = (10, 20)


@dataclass(frozen=True)
class Terminal:
    """What is known of a terminal.

    Attributes:
        protocol: One of `PROTOCOLS`; None if it can't show pictures.
        cell: Width and height of a character in pixels.
        typed: What was typed while the terminal was asked.
    """

    protocol: str | None
    cell: tuple[int, int] = USUAL_CELL
    typed: str = ""


def detect(wanted: str = AUTO, environ: Mapping[str, str] = os.environ) -> Terminal:
    """Find out about the terminal that standard output is.

    Args:
        wanted: One of `PROTOCOLS`, or "auto" for the best one that the terminal understands.
        environ: The environment.

    Raises:
        UsageError: Standard output is no terminal, or `wanted` is unknown.
    """
    if wanted not in (AUTO, *PROTOCOLS):
        raise UsageError(f"--show {wanted!r} is unknown: choose one of {', '.join((AUTO, *PROTOCOLS))}")
    if not is_terminal(sys.stdout):
        raise UsageError("--show draws on the terminal, but standard output is not one: leave it out")
    if wanted == AUTO and environ.get("TERM", "") in POOR_TERMS and sys.platform != "win32":
        return Terminal(None)
    cell = _cell_of_window()
    protocol = known_by_name(environ) if wanted == AUTO else wanted
    if protocol == "blocks" or (protocol and cell) or not _answers(environ):
        return Terminal(protocol or "blocks", cell or USUAL_CELL)
    found = understood(_ask(PATIENCE_OF_SSH if "SSH_CONNECTION" in environ else PATIENCE))
    return Terminal(protocol or found.protocol, cell or found.cell, found.typed)


def is_terminal(stream: object) -> bool:
    """Whether a standard stream, which may be closed, is a terminal."""
    try:
        return bool(stream is not None and stream.isatty())  # type: ignore[attr-defined]
    except ValueError:
        return False


def known_by_name(environ: Mapping[str, str]) -> str | None:
    """Return the protocol of a terminal that the environment names; None if it has to be asked.

    A multiplexer stands between: inside it, the names are those of the terminal in which it was started.
    """
    term = environ.get("TERM", "")
    if "TMUX" in environ or term.startswith(("screen", "tmux")):
        return None
    if environ.get("TERM_PROGRAM") in MUTE or term == CONSOLE:
        return "blocks"
    names = (environ.get("TERM_PROGRAM", ""), environ.get("LC_TERMINAL", ""), term)
    return next((protocol for name in names if (protocol := _by_name(name))), None)


def understood(answer: str) -> Terminal:
    """Read what a terminal answered to `QUESTIONS`, in any order, with keys that were typed in between."""
    found = {what: pattern.search(answer) for what, pattern in ANSWERS.items()}
    rest = answer
    for pattern in ANSWERS.values():
        rest = pattern.sub("", rest)
    # What remains of cut-off answers and keys such as arrows is nothing that was meant as text.
    typed = re.sub(r"\x1b[P_][^\x1b]*(\x1b\\)?|\x1b(\[[\d;?<>]*.?|O.?)?", "", rest)
    cell = USUAL_CELL
    if (size := found["cell"]) and int(size[1]) and int(size[2]):
        cell = (int(size[2]), int(size[1]))
    name, kitty, attributes = found["name"], found["kitty"], found["attributes"]
    protocol = _by_name(name[1]) if name else None
    if protocol is None and attributes and "4" in attributes[1].split(";"):
        protocol = "sixel"
    if protocol is None and kitty and kitty[1] == "OK":
        protocol = "kitty"
    return Terminal(protocol or "blocks", cell, "".join(c for c in typed if c.isprintable()))


def _by_name(name: str) -> str | None:
    lowered = name.lower()
    return next((protocol for known, protocol in BY_NAME.items() if known in lowered), None)


def _answers(environ: Mapping[str, str]) -> bool:
    """Whether a terminal can be asked: it is known to understand questions, and the answers come to standard input."""
    if environ.get("TERM", "") in (*POOR_TERMS, CONSOLE) or environ.get("TERM_PROGRAM") in MUTE:
        return False
    return sys.platform != "win32" and is_terminal(sys.stdin)


def _cell_of_window() -> tuple[int, int] | None:
    """Return the size of a character as the system knows it, which many terminals tell it."""
    if sys.platform == "win32":
        return None
    import fcntl
    import struct
    import termios

    with suppress(OSError, ValueError, AttributeError):
        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
        lines, columns, width, height = struct.unpack("4H", size)
        if lines and columns and width >= columns and height >= lines:
            return width // columns, height // lines
    return None


def _ask(patience: float) -> str:
    """Send `QUESTIONS`, and return what comes until the last answer, or for so many seconds."""
    if sys.platform == "win32":
        return ""
    import select
    import termios
    import tty

    answer, keyboard = b"", sys.stdin.fileno()
    try:
        before = termios.tcgetattr(keyboard)
        if os.tcgetpgrp(keyboard) != os.getpgrp():  # the system stops processes in the background that read keys
            return ""
    except (OSError, termios.error):
        return ""
    try:
        tty.setcbreak(keyboard, termios.TCSANOW)
        sys.stdout.write(QUESTIONS)
        sys.stdout.flush()
        end = time.monotonic() + patience
        while (left := end - time.monotonic()) > 0 and select.select([keyboard], [], [], left)[0]:
            if not (data := os.read(keyboard, 4096)):
                break
            answer += data
            if ANSWERS["attributes"].search(answer.decode("utf-8", "replace")):
                break
    except OSError:
        pass
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)
    return answer.decode("utf-8", "replace")
