"""The log: one line for each thing that happened, as JSON or for people."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

LOGGER = "fluxonnx.serve"


class JsonFormatter(logging.Formatter):
    """A JSON object in each line: time, level, event, and the facts."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; characters that a terminal would obey are escaped."""
        facts = " ".join(f"{name}={value!r}" for name, value in getattr(record, "facts", {}).items())
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {facts}".rstrip()
        line = line.encode("unicode_escape").decode("ascii")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def start(kind: str | None, quiet: bool, stream: TextIO | None = None) -> None:
    """Write the log of the server to a stream, by default standard error.

    Args:
        kind: "json" or "text"; None for text on a terminal and JSON elsewhere.
        quiet: Whether to write warnings and errors only.
        stream: Where to.
    """
    stream = stream or sys.stderr
    if kind is None:
        kind = "text" if stream is not None and stream.isatty() else "json"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    for name in (LOGGER, "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.WARNING if quiet or name != LOGGER else logging.INFO)
