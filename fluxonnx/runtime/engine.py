"""How graphs are run, and the seam at which another engine can take onnxruntime's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from fluxonnx.checkpoint.manifest import Build
from fluxonnx.errors import UsageError
from fluxonnx.lora.adapted import Adapted
from fluxonnx.machine import MOST_THREADS, available_memory
from fluxonnx.runtime.events import Watch
from fluxonnx.runtime.providers import CPU, check_provider, check_provider_options


class Runner(Protocol):
    """A loaded graph."""

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the graph; the outputs belong to the caller."""

    def close(self) -> None:
        """Free the memory of the graph."""


@dataclass(frozen=True)
class SessionOptions:
    """How graphs are run.

    Attributes:
        threads: Threads per operator; None for one per core that this process may use.
        low_memory: One picture is made at a time, and large ones are encoded and decoded in tiles.
        provider: The execution provider, see `providers`.
        provider_options: Options of the provider that a person chose.
        keep_loaded: Whether graphs stay loaded between pictures, where there is memory for all of them.
        profile: Whether sessions run under onnxruntime's profiler; each emits `OperatorsTimed` when it is closed.
        watch: Called with every event.
        engine: Loads graphs; None for onnxruntime.
        free_memory: Returns how many bytes of memory are free.
        adapted: The graph to run in the place of the one in the file, whose weights it uses; None for that one.
    """

    threads: int | None = None
    low_memory: bool = False
    keep_loaded: bool = False
    provider: str = CPU
    provider_options: Mapping[str, str] = field(default_factory=dict)
    profile: bool = False
    watch: Watch | None = None
    engine: Engine | None = None
    free_memory: Callable[[], int] = available_memory
    adapted: Adapted | None = None

    def __post_init__(self) -> None:
        """Validate the options; raises UsageError."""
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UsageError(f"threads is {self.threads}, but must be from 1 to {MOST_THREADS}")
        check_provider(self.provider)
        check_provider_options(self.provider, self.provider_options)


# engine(graph, component, build, options) -> the graph, loaded
Engine = Callable[[Path, str, Build, SessionOptions], Runner]
