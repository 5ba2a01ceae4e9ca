"""The prompt of a session: lines are edited, completed and remembered by prompt_toolkit."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.shortcuts import CompleteStyle

from fluxonnx.errors import FluxonnxError
from fluxonnx.terminal.commands import Ended, obey, settings
from fluxonnx.terminal.completer import Lines
from fluxonnx.terminal.history import open_history
from fluxonnx.terminal.session import Session

# What the line at the bottom of the window leaves out.
DULL = ("default", "none", "random", "off")


def talk(session: Session, read: Callable[[], str] | None = None) -> None:
    """Read lines and obey them until the session ends.

    Args:
        session: The session.
        read: Returns the next line; raises EOFError at the end and KeyboardInterrupt for Ctrl-C. By default they are
            read from the terminal.
    """
    read = read or reader(session)
    try:
        while True:
            try:
                obey(session, read())
            except KeyboardInterrupt:
                continue  # the line is gone, and a new one begins
            except EOFError:
                break
    except Ended:
        pass
    finally:
        session.studio.close()


def reader(session: Session, **options: Any) -> Callable[[], str]:
    """Return a function that reads a line from the terminal.

    Args:
        session: What is completed, and told at the bottom of the window.
        **options: Further arguments of `PromptSession`.
    """
    prompt: PromptSession[str] = PromptSession(
        history=_history(session),
        completer=Lines(session),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE if _is_dumb() else CompleteStyle.COLUMN,
        bottom_toolbar=None if _is_dumb() else lambda: HTML("{}").format(summary(session)),
        enable_history_search=True,
        mouse_support=False,
        **options,
    )

    def read() -> str:
        typed, session.typed = session.typed, ""
        return prompt.prompt(f"${len(session.made) + 1} ", default=typed)

    return read


def _history(session: Session) -> History:
    try:
        return open_history()
    except FluxonnxError as error:
        session.complain(str(error))
        return InMemoryHistory()


def _is_dumb() -> bool:
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def summary(session: Session) -> str:
    """Return what differs from the defaults, in a line."""
    found = [
        f"{name} {value}" for name, value in settings(session) if value not in DULL and not value.endswith("(default)")
    ]
    return "  ".join(["!help for commands", *found])
