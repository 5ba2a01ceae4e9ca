"""Ctrl-C while a picture is made: it stops the picture at its next step, and at once if it is pressed again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from fluxonnx.errors import Cancelled

NOTICE = b"\r\nStopping at the next step; Ctrl-C again stops at once.\r\n"


class Stop:
    """Whether somebody asked for the picture to stop."""

    def __init__(self) -> None:
        """Nobody did yet."""
        self.asked = False

    def check(self) -> None:
        """Stop the run from inside of it.

        Raises:
            Cancelled: Somebody asked for that, and was not told yet.
        """
        if self.asked:
            self.asked = False  # a run that ends reports phases, too
            raise Cancelled("stopped")


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Have the first Ctrl-C in the block ask for a stop, and the next one raise KeyboardInterrupt.

    The model stays whole after the first. Outside of the main thread, Python does not allow it: nothing changes there.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError):  # not by Python's streams, which may be in the middle of a line
            os.write(2, NOTICE)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
