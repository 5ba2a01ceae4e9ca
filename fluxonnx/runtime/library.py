"""onnxruntime, imported where it is needed, and silent unless someone wants to hear it."""

from __future__ import annotations

import os
import sys
from typing import Any

from fluxonnx.errors import UsageError

# From 0, everything, to 4, only what ends the process. onnxruntime has no variable of its own for that.
VARIABLE = "FLUXONNX_ORT_LOG"
# Errors are raised, and onnxruntime's own lines about them would be a second report of each, in C++.
SILENT = 4


def log_severity() -> int:
    """Return what onnxruntime may print: from 0, everything, to 4, which is the default.

    Raises:
        UsageError: $FLUXONNX_ORT_LOG is something else.
    """
    value = os.environ.get(VARIABLE) or str(SILENT)
    if value not in ("0", "1", "2", "3", "4"):
        raise UsageError(f"{VARIABLE} is {value[:40]!r}: set it to 0 (onnxruntime prints everything) to 4 (nothing)")
    return int(value)


def library() -> Any:
    """Return the module `onnxruntime`, which takes time to import.

    It has a logger for what belongs to no session, such as a provider whose library can't be loaded. That is silent,
    too, unless the program has imported onnxruntime itself, and so may have chosen what it prints.
    """
    imported = "onnxruntime" in sys.modules
    import onnxruntime

    if not imported:
        onnxruntime.set_default_logger_severity(log_severity())
    return onnxruntime
