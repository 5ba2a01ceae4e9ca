"""Where the time goes inside the graphs: onnxruntime's profiler, summed up by operator type."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fluxonnx.errors import FluxonnxError


@dataclass(frozen=True)
class Operator:
    """All nodes of one type in one graph.

    Attributes:
        type: "Gemm", say.
        calls: How often such a node ran.
        seconds: How long they took together.
        share: The part of all the graph's nodes' time, in [0, 1].
    """

    type: str
    calls: int
    seconds: float
    share: float


class Profile:
    """Collects the time each operator type takes, per graph, from all sessions that are opened with it.

    A context manager, since onnxruntime writes files, which are removed at the end.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fluxonnx-profile-")
        # graph -> operator type -> [calls, microseconds]
        self._found: dict[str, dict[str, list[int]]] = {}

    def start(self, settings: Any, component: str) -> None:
        """Turn the profiler on in the settings of a session that is about to be opened."""
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(self._folder.name) / component)

    def collect(self, component: str, session: Any) -> None:
        """Take what the profiler wrote about a session that is about to be closed.

        Raises:
            FluxonnxError: It could not be written, or is not as expected.
        """
        path = Path(session.end_profiling())
        try:
            events = json.loads(path.read_text("utf-8"))
            path.unlink()
            graph = self._found.setdefault(component, defaultdict(lambda: [0, 0]))
            for event in events:
                # Other events of a node, which older versions write, are the time before and after it.
                if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                    total = graph[event["args"]["op_name"]]
                    total[0] += 1
                    total[1] += event["dur"]
        except (OSError, ValueError, KeyError) as error:
            raise FluxonnxError(f"the profile of {component} can't be read: {error}") from None

    def operators(self) -> dict[str, list[Operator]]:
        """Return the operator types of each graph, the slowest first."""
        tables = {}
        for component, graph in self._found.items():
            total = sum(microseconds for _, microseconds in graph.values())
            rows = [
                Operator(type, calls, microseconds / 1e6, microseconds / total if total else 0.0)
                for type, (calls, microseconds) in graph.items()
            ]
            tables[component] = sorted(rows, key=lambda row: (-row.seconds, row.type))
        return tables

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()
