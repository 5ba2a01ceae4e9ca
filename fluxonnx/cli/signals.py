"""Signals that end a run: it cleans up, and its exit code says which signal it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGINT is already a KeyboardInterrupt. Windows has no SIGHUP.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(BaseException):
    """A signal asked the process to end; no `except Exception` may hold it up."""

    def __init__(self, number: int) -> None:
        """Remember which."""
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Raise `Terminated` in the block for a signal that would end the process at once, without a clean-up.

    Signals that are ignored, as under nohup, stay so. Nothing changes outside of the main thread, where Python does not
    allow it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    ours = [number for number in ENDING if before[number] == signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for other in ours:  # a terminal that closes sends more than one
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
