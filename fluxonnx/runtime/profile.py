"""The time of each operator type in a session, as onnxruntime's profiler measures it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fluxonnx.errors import FluxonnxError
from fluxonnx.runtime.events import Operator, ranked


class Profile:
    """The profiler of one session; it writes to a temporary folder until `finish` or `discard` removes it."""

    def __init__(self, settings: Any) -> None:
        """Turn the profiler on in the `onnxruntime.SessionOptions` of a session that is about to be opened."""
        self._folder = TemporaryDirectory(prefix="fluxonnx-profile-")
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(self._folder.name) / "session")

    def finish(self, session: Any, component: str) -> tuple[Operator, ...]:
        """Return what was measured in an `onnxruntime.InferenceSession` that is about to be closed.

        Raises:
            FluxonnxError: onnxruntime could not write the profile, or its format is unknown.
        """
        try:
            return operators(json.loads(Path(session.end_profiling()).read_text("utf-8")))
        except (OSError, ValueError, KeyError) as error:
            raise FluxonnxError(f"the profile of {component} can't be read: {error}") from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


def operators(records: Iterable[Mapping[str, Any]]) -> tuple[Operator, ...]:
    """Add up the records of a profile by operator type, the slowest first.

    Raises:
        KeyError: The records are in an unknown format.
    """
    return ranked(
        (record["args"]["op_name"], 1, record["dur"])
        for record in records
        # Older versions also record the time before and after a node.
        if record.get("cat") == "Node" and record["name"].endswith("_kernel_time")
    )
