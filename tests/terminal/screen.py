"""A program on a pseudo-terminal, and the screen that a person would see."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte
from pexpect.fdpexpect import fdspawn

# Longer than anything takes on a busy machine: a test that waits for so long fails.
PATIENCE = 60
# What a terminal of the tests is called; nothing of the terminal in which the tests run is inherited.
TERMINAL = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
OTHERS = (
    "TMUX",
    "TERM_PROGRAM",
    "LC_TERMINAL",
    "NO_COLOR",
    "SSH_CONNECTION",
    "FLUXONNX_MODEL",
    "XDG_STATE_HOME",
    "COLUMNS",
    "LINES",
)


def environment(home: Path, **values: str) -> dict[str, str]:
    """The environment of a program whose user has this home folder."""
    inherited = {name: value for name, value in os.environ.items() if name not in OTHERS}
    # The terminal of the tests does not say where its cursor is.
    return {**inherited, **TERMINAL, "HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1", **values}


# Makes a session's terminal of standard input, heeds Ctrl-C also under nohup, and becomes another program.
TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A program, started on a terminal of its own.

    It is not a fork of this process: libraries with threads that other tests have loaded may crash in one.
    """

    def __init__(
        self, words: list[str], cwd: Path, lines: int = 40, columns: int = 100, answers: bytes = b"", **values: str
    ) -> None:
        """Start it; `answers` is what the terminal says when it is asked what it is."""
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._answers = answers
        self._held = b""
        self.sent = b""
        ours, theirs = os.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", TAKE_TERMINAL, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env=environment(cwd, **values),
            start_new_session=True,
        )
        os.close(theirs)
        self.child = fdspawn(ours, timeout=PATIENCE)

    @property
    def text(self) -> str:
        """What the screen shows."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def wait(self, done: Callable[[Terminal], bool] | str) -> str:
        """Read until the screen shows a text, or until something else is true of it."""
        is_done = (lambda terminal: done in terminal.text) if isinstance(done, str) else done
        while not is_done(self):
            try:
                self._take(self.child.read_nonblocking(65536, PATIENCE))
            except (pexpect.EOF, pexpect.TIMEOUT) as error:
                raise AssertionError(f"{type(error).__name__} while waiting for {done!r}:\n{self.text}") from None
        return self.text

    def _take(self, data: bytes) -> None:
        self.sent += data
        if self._answers and b"\x1b[c" in data:
            self.child.send(self._answers)
        # pyte does not know the strings in which pictures are sent by Kitty's protocol and Sixel, and would print them.
        data = re.sub(rb"\x1b([_P][^\x1b]*\x1b\\|\]1337;[^\x07]*\x07)", b"", self._held + data)
        start = re.search(rb"\x1b([_P]|]1337|$)", data)
        end = start.start() if start else len(data)
        self._held = data[end:]
        self._stream.feed(data[:end])

    def type(self, text: str) -> None:
        """Type a line, and Enter."""
        self.child.send(text + "\r")

    def end(self) -> int:
        """Read to the end of the program; returns its exit code."""
        while True:
            try:
                self._take(self.child.read_nonblocking(65536, PATIENCE))
            except pexpect.EOF:
                break
        self.child.close()
        return self.process.wait(PATIENCE)


def fluxonnx(*words: object) -> list[str]:
    """The words that start the command line."""
    return [sys.executable, "-m", "fluxonnx", *map(str, words)]
