"""Ctrl-C while a picture is made; test_repl.py presses it in a terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: whoever runs the tests would be interrupted if this went wrong.
PROGRAM = """
import os, signal
from fluxonnx.errors import Cancelled
from fluxonnx.terminal.stopping import stoppable

signal.signal(signal.SIGINT, signal.default_int_handler)
with stoppable() as stop:
    stop.check()
    os.kill(os.getpid(), signal.SIGINT)
    try:
        stop.check()
    except Cancelled:
        print("stopped")
    stop.check()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        stop.check()
    except KeyboardInterrupt:
        print("at once")
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_first_stops_at_the_next_step_and_the_second_at_once():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n") == ["stopped", "at once", "True", ""]
    assert "Stopping at the next step" in done.stderr
