"""A worker of the local engine: a painter and rows come in on standard input, results go out on standard output."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
from typing import IO, Any


def main() -> None:
    """Paint what comes in, until nothing more does."""
    # Ctrl-C reaches all processes of a terminal: the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the results
    rows: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, rows), daemon=True).start()
    painter = rows.get()
    while True:
        for result in painter.paint(rows.get()):
            pickle.dump(result, out)
            out.flush()


def _read(stream: IO[bytes], rows: queue.Queue[Any]) -> None:
    """Hand over what comes in; end the process, whatever it is doing, when the one that started it has gone."""
    try:
        while True:
            rows.put(pickle.load(stream))
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
